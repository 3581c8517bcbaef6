//! What forbids a merge: tensors that do not fit, facts that differ, rules that do nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::Survey;
use crate::checkpoint::TensorInfo;
use crate::merge::choice::Treatment;
use crate::merge::listing::Listing;
use crate::merge::recipe::{Kind, Take};

impl Survey<'_> {
    /// A rule that matches nothing is a slip of the pen, and so may be one that never decides.
    pub(super) fn check_rules(&mut self, all: &BTreeMap<String, Treatment>) {
        if self.sources.iter().take(self.recipe.members().len()).any(Option::is_none) {
            return;
        }
        for (index, rule) in self.recipe.rules().iter().enumerate() {
            if !all.keys().any(|name| rule.pattern.matches(name)) {
                self.problems.push(format!("rules[{index}]: {:?} matches no tensor of the members", rule.pattern.as_str()));
            } else if !all.values().any(|treatment| *treatment == Treatment::Rule(index)) {
                self.notes.push(format!("rules[{index}] decides nothing: rules before it match all of its tensors"));
            }
        }
    }

    pub(super) fn check_tensors(&mut self, decided: &BTreeMap<String, Treatment>, head: &BTreeSet<String>) {
        let mut problems = Vec::new();
        for (index, source) in self.sources.iter().enumerate() {
            let Some(source) = source.as_ref().filter(|source| source.sound) else { continue };
            let is_init = index == self.recipe.members().len();
            let (mut missing, mut dtypes, mut shapes) = (Listing::default(), Listing::default(), Listing::default());
            let mut headless = Vec::new();
            for (name, &treatment) in decided {
                // Init is the same model also where it is not read, but it may lack what nobody reads of it.
                let holds = treatment.holders(self.recipe).contains(&index);
                let by_method = is_init && treatment == Treatment::Method && source.get(name).is_some();
                if !(holds || by_method) {
                    continue;
                }
                let label = &source.label;
                let Some((other, expected)) = self.lender(name, treatment) else { continue };
                let Some(found) = source.get(name) else {
                    match is_init && head.contains(name) {
                        true => headless.push(name.as_str()),
                        false => missing.push(format!("{label}: tensor {name:?} is missing, {} has it", other.label)),
                    }
                    continue;
                };
                if let Some(wrong) = self.wrong_dtype(treatment, found, expected) {
                    dtypes.push(format!("{label}: tensor {name:?} is {}, {wrong}", found.dtype));
                }
                if found.shape != expected.shape {
                    let (found, expected) = (&found.shape, &expected.shape);
                    shapes.push(format!("{label}: tensor {name:?} has shape {found:?}, expected {expected:?} as in {}", other.label));
                }
            }
            for listing in [missing, dtypes, shapes] {
                listing.finish(&source.label, &mut problems);
            }
            if !headless.is_empty() {
                problems.push(self.needs_a_rule(&headless));
            }
        }
        self.problems.append(&mut problems);
    }

    /// What is wrong with a tensor's dtype, given that of the first that takes part.
    fn wrong_dtype(&self, treatment: Treatment, found: &TensorInfo, expected: &TensorInfo) -> Option<String> {
        let averaged = match treatment {
            Treatment::Method => true,
            Treatment::Equal => self.recipe.kind() == Kind::Reward,
            Treatment::Rule(rule) => {
                self.recipe.kind() == Kind::Reward || self.recipe.rules().get(rule).is_some_and(|rule| matches!(rule.take, Take::Mix(_)))
            }
        };
        if averaged && !found.dtype.is_float() {
            return Some("expected floating-point numbers to average".to_owned());
        }
        (treatment == Treatment::Equal && found.dtype != expected.dtype)
            .then(|| format!("expected {}: it is not averaged, so it must be the same in all members", expected.dtype))
    }

    fn needs_a_rule(&self, tensors: &[&str]) -> String {
        let pattern = tensors.first().map_or("score", |name| name.split('.').next().unwrap_or(name));
        let names: Vec<&str> = self.recipe.members().iter().map(|member| member.name.as_str()).collect();
        let first = names.first().copied().unwrap_or_default();
        let ones: Vec<String> = names.iter().map(|name| format!("{name}: 1")).collect();
        format!(
            "init has no reward head ({}), as a language model has none, so heads have no task vectors; say by a rule whose head is \
             taken ({{match: \"{pattern}.*\", from: {first}}}) or that it is averaged ({{match: \"{pattern}.*\", coefficients: {{{}}}}})",
            tensors.join(", "),
            ones.join(", ")
        )
    }

    /// Whoever has a reward head must read text as the first member does; init, and a member whose head a rule replaces,
    /// only lend weights. Rows of embeddings are mixed only where they belong to the same tokens.
    pub(super) fn check_differences(&mut self, head: &BTreeSet<String>, embedding: Option<&str>, decided: &BTreeMap<String, Treatment>) {
        let Some((first, _)) = &self.first else { return };
        for (index, source) in self.sources.iter().enumerate() {
            let Some(source) = source else { continue };
            let lends = index == self.recipe.members().len() || head.iter().any(|name| source.get(name).is_none());
            if lends && source.label == *first {
                self.problems.push(format!(
                    "{first} has no reward head, and the first member's configuration and tokenizer become the merged model's; \
                     list a reward model first"
                ));
            }
            let sentence = |difference: &String| format!("{} differs from {first}: {difference}", source.label);
            self.problems.extend(source.differences.model.iter().map(sentence));
            let text = source.differences.text.iter().map(sentence);
            if !lends {
                self.problems.extend(text);
                continue;
            }
            self.notes.extend(text);
            let mixes = |name: &str| {
                let sources = decided.get(name).map(|treatment| treatment.sources(self.recipe)).unwrap_or_default();
                sources.len() > 1 && sources.contains(&index)
            };
            // Which tensor of an unknown family holds the rows of tokens is not known.
            let mixes_rows = embedding.map_or_else(|| decided.keys().any(|name| mixes(name)), mixes);
            if let Some(rows) = source.differences.rows.as_ref().filter(|_| mixes_rows) {
                let place = embedding.unwrap_or("the embedding");
                self.problems.push(format!("{}; rows of {place} would be mixed with those of other tokens", sentence(rows)));
            }
        }
    }
}
