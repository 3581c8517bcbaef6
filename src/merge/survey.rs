//! What the members of a recipe say together: the making of a plan.

mod checks;
mod notes;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::choice::{Treatment, treatments};
use super::compare::{Differences, Facts};
use super::heads;
use super::nested::Nested;
use super::plan::{Input, MergeError, MergePlan};
use super::planned::{PlannedMember, PlannedSource};
use super::recipe::{Kind, Member, Recipe};
use super::tracked::{Places, stored};
use crate::checkpoint::{
    Architecture, CheckpointError, HeadChoice, HeadKeys, Layout, LayoutProblems, Manifest, TensorInfo, TensorSource, is_recomputed,
};

/// What is known after some of the members.
pub struct Survey<'r> {
    recipe: &'r Recipe,
    problems: Vec<String>,
    notes: Vec<String>,
    /// The first member that could be opened; all others are compared to it.
    first: Option<(String, Facts)>,
    /// One for each member that was added, then one for init; `None` for what could not be opened or does not exist.
    sources: Vec<Option<Source>>,
    unused: BTreeSet<String>,
}

/// A member or init, without its configuration and tokenizer, which take much memory.
struct Source {
    /// As sentences name it.
    label: String,
    weights: Arc<dyn TensorSource>,
    architecture: Option<Architecture>,
    /// To the first member.
    differences: Differences,
    lost_head: Option<String>,
    nested: Option<Arc<Nested>>,
    /// Its tensors are those of its architecture, so that they can be compared with others'.
    sound: bool,
}

impl Source {
    fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.weights.manifest().get(name)
    }
}

impl<'r> Survey<'r> {
    pub fn new(recipe: &'r Recipe) -> Self {
        Self { recipe, problems: Vec::new(), notes: Vec::new(), first: None, sources: Vec::new(), unused: BTreeSet::new() }
    }

    pub fn add(&mut self, member: &Member, input: Option<Result<Input, CheckpointError>>) {
        let label = format!("member {:?}", member.name.as_str());
        match input {
            Some(input) => self.add_source(label, input),
            None => {
                self.problems.push(format!("{label}: no checkpoint was given for it"));
                self.sources.push(None);
            }
        }
    }

    /// The initialisation must be the same model, or "shared" would be untrue, but it may lack tensors (the policy it comes
    /// from has no reward head) and may have another template.
    pub fn add_init(&mut self, input: Option<Result<Input, CheckpointError>>) {
        match input {
            Some(input) => self.add_source("init".to_owned(), input),
            None => self.sources.push(None),
        }
    }

    fn add_source(&mut self, label: String, input: Result<Input, CheckpointError>) {
        let Input { weights, config, architecture, text, notes, lost_head, nested } = match input {
            Ok(input) => input,
            Err(error) => {
                self.problems.push(format!("{label}: {error}"));
                return self.sources.push(None);
            }
        };
        let is_init = self.sources.len() == self.recipe.members().len();
        let architecture = architecture.map(|architecture| self.chosen(architecture));
        let unknown = [architecture.as_ref().err(), text.as_ref().err().filter(|_| !is_init)];
        let told = unknown.into_iter().flatten().map(|error| format!("{label}: {error}"));
        if self.recipe.kind() == Kind::Reward {
            self.problems.extend(told)
        } else {
            self.notes.extend(told)
        }
        self.notes.extend(notes.into_iter().map(|note| format!("{label}: {note}")));
        let known = architecture.as_ref().ok().cloned();
        let facts = Facts { config, architecture, text };
        let differences = self.first.as_ref().map(|(_, first)| first.differences(&facts)).unwrap_or_default();
        if self.first.is_none() && !is_init {
            self.first = Some((label.clone(), facts));
        }
        let sound = self.recipe.kind() == Kind::Policy || is_init;
        self.sources.push(Some(Source { label, weights, architecture: known, differences, lost_head, nested, sound }));
    }

    /// With what the recipe says of the head, where a checkpoint leaves it open.
    fn chosen(&self, mut architecture: Architecture) -> Architecture {
        architecture.head.choice = self.recipe.head().or(&architecture.head.choice);
        architecture
    }

    pub fn finish(mut self) -> Result<MergePlan, MergeError> {
        let all = self.all_tensors();
        self.check_rules(&all);
        let layout = if self.recipe.kind() == Kind::Reward { self.reward_layout(&all) } else { None };
        let decided: BTreeMap<String, Treatment> = match (&layout, self.recipe.kind()) {
            (Some(layout), _) => layout.used().iter().filter_map(|name| Some((name.clone(), *all.get(name)?))).collect(),
            (None, Kind::Reward) => BTreeMap::new(),
            (None, Kind::Policy) => self.policy_tensors(all),
        };
        let head = layout.as_ref().map(head_tensors).unwrap_or_default();
        self.check_tensors(&decided, &head);
        self.check_differences(&head, layout.as_ref().map(|layout| layout.embedding.as_str()), &decided);
        let manifest: Manifest =
            decided.iter().filter_map(|(name, &treatment)| Some((name.clone(), self.merged(name, treatment)?))).collect();
        self.note_the_unusual(&decided);
        let (Some((_, facts)), true) = (self.first, self.problems.is_empty()) else {
            return Err(MergeError { problems: self.problems });
        };
        let recipe = self.recipe;
        let (mut places, sources) = (Places::default(), self.sources.into_iter().enumerate());
        let planned = sources.map(|(index, source)| Some(plan_source(recipe, index, source?, &decided, &mut places)));
        let mut planned: Vec<Option<PlannedSource>> = planned.collect();
        let init = planned.drain(recipe.members().len()..).next().flatten();
        let member = |(member, source): (&Member, Option<PlannedSource>)| {
            let (source, lacks) = (source?, Vec::new());
            let planned = PlannedMember { name: member.name.clone(), coefficient: member.coefficient, source, lacks };
            let lacks = decided.keys().filter(|name| planned.source.weights.get(name).is_none()).cloned().collect();
            Some(PlannedMember { lacks, ..planned })
        };
        let members = recipe.members().iter().zip(planned).filter_map(member).collect();
        let Facts { mut config, architecture, text } = facts;
        if let Ok(architecture) = &architecture {
            heads::record(&architecture.head.choice, &mut config);
        }
        let (recipe, treatments, notes) = (recipe.clone(), decided, self.notes);
        Ok(MergePlan { recipe, config, architecture, text, layout, manifest, treatments, members, init, notes })
    }

    fn sound(&self, index: usize) -> Option<&Source> {
        self.sources.get(index)?.as_ref().filter(|source| source.sound)
    }

    fn all_tensors(&self) -> BTreeMap<String, Treatment> {
        let manifests: Vec<Option<&Manifest>> =
            self.sources.iter().map(|source| source.as_ref().map(|source| source.weights.manifest())).collect();
        let (members, init) = manifests.split_at(self.recipe.members().len());
        let found = treatments(self.recipe, members, init.first().copied().flatten());
        found.into_iter().map(|(name, treatment)| (name.to_owned(), treatment)).collect()
    }

    /// The tensor as the first has it that takes part; `None` if the only one that could does not have it.
    fn lender(&self, name: &str, treatment: Treatment) -> Option<(&Source, &TensorInfo)> {
        let mut holders = treatment.holders(self.recipe).into_iter().filter_map(|index| self.sound(index));
        holders.find_map(|source| Some((source, source.get(name)?)))
    }

    /// The layout of the merged model. Every member must have the tensors of its own, but for those that a rule takes from
    /// others.
    fn reward_layout(&mut self, all: &BTreeMap<String, Treatment>) -> Option<Layout> {
        let shared = self.first.as_ref().and_then(|(_, first)| first.architecture.as_ref().ok()).cloned();
        let mut read: Option<(String, HeadKeys, HeadChoice)> = None;
        for index in 0..self.recipe.members().len() {
            let Some(Some(source)) = self.sources.get(index) else { continue };
            // What rules take from others has the shape of the merged model's.
            let architecture = if self.recipe.rules().is_empty() { &source.architecture } else { &shared };
            let Some(architecture) = architecture else { continue };
            let layout = Layout::new(architecture, &self.completed(source, index, all));
            match layout {
                Err(problems) => {
                    // How a head was lost says more than that there is none.
                    let lost = source.lost_head.clone().filter(|_| problems.headless.is_some());
                    let problems = LayoutProblems { headless: lost.or(problems.headless), ..problems };
                    self.problems.extend(problems.into_sentences().map(|problem| format!("{}: {problem}", source.label)));
                }
                Ok(layout) => {
                    self.unused.extend(layout.unused().iter().cloned());
                    self.notes.extend(heads::note(&source.label, source.architecture.as_ref().unwrap_or(architecture)));
                    let choice = &architecture.head.choice;
                    match &read {
                        None => read = Some((source.label.clone(), layout.head.clone(), choice.clone())),
                        Some((first, head, chosen)) => {
                            let found = heads::difference((head, chosen), (&layout.head, choice));
                            self.problems.extend(found.map(|problem| format!("{} differs from {first}: {problem}", source.label)));
                        }
                    }
                    if let Some(Some(source)) = self.sources.get_mut(index) {
                        source.sound = true;
                    }
                }
            }
        }
        let merged = all.iter().filter_map(|(name, &treatment)| Some((name.clone(), self.lender(name, treatment)?.1.clone())));
        let merged: Manifest = merged.collect();
        match Layout::new(shared.as_ref()?, &merged) {
            Ok(layout) => Some(layout),
            Err(problems) => {
                if self.problems.is_empty() {
                    let gone = all.iter().filter(|&(name, &treatment)| self.lender(name, treatment).is_none());
                    let gone: Vec<String> = gone.filter_map(|(name, treatment)| self.taken_from_nowhere(name, *treatment)).collect();
                    self.problems.extend(gone);
                    self.problems.extend(problems.into_sentences().map(|problem| format!("the merged model: {problem}")));
                }
                None
            }
        }
    }

    /// What a rule cannot take, as a sentence.
    fn taken_from_nowhere(&self, name: &str, treatment: Treatment) -> Option<String> {
        let Treatment::Rule(rule) = treatment else { return None };
        let from = *treatment.sources(self.recipe).first()?;
        let from = self.recipe.members().get(from).map_or("init".to_owned(), |member| format!("member {:?}", member.name.as_str()));
        Some(format!("rules[{rule}] takes tensor {name:?} from {from}, which does not have it"))
    }

    /// A member's tensors, with what rules take from others in place of its own.
    fn completed<'s>(&'s self, source: &'s Source, index: usize, all: &BTreeMap<String, Treatment>) -> Cow<'s, Manifest> {
        if self.recipe.rules().is_empty() {
            return Cow::Borrowed(source.weights.manifest());
        }
        let info = |name: &String, treatment: Treatment| -> Option<TensorInfo> {
            if let Treatment::Rule(_) = treatment {
                let takers = treatment.sources(self.recipe);
                let mut lent = takers.iter().filter_map(|&taker| self.sources.get(taker)?.as_ref()?.get(name));
                if let Some(lent) = lent.next().filter(|_| !takers.contains(&index)) {
                    return Some(lent.clone());
                }
            }
            source.get(name).cloned()
        };
        Cow::Owned(all.iter().filter_map(|(name, &treatment)| Some((name.clone(), info(name, treatment)?))).collect())
    }

    fn policy_tensors(&mut self, all: BTreeMap<String, Treatment>) -> BTreeMap<String, Treatment> {
        let mut decided = BTreeMap::new();
        for (name, treatment) in all {
            match self.lender(&name, treatment) {
                Some((_, info)) if treatment == Treatment::Method && is_recomputed(&name, info) => _ = self.unused.insert(name),
                Some((_, info)) if treatment == Treatment::Equal && is_recomputed(&name, info) => _ = self.unused.insert(name),
                Some(_) => _ = decided.insert(name, treatment),
                None => self.notes.extend(self.taken_from_nowhere(&name, treatment).map(|taken| format!("{taken}, so it is left out"))),
            }
        }
        decided
    }

    /// Name and facts of a merged tensor: what is averaged gets the recipe's dtype.
    fn merged(&self, name: &str, treatment: Treatment) -> Option<TensorInfo> {
        let (_, info) = self.lender(name, treatment)?;
        let dtype = if treatment == Treatment::Equal || !info.dtype.is_float() { info.dtype } else { self.recipe.dtype() };
        Some(TensorInfo { dtype, shape: info.shape.clone() })
    }

    /// The tensors that are read of a source.
    fn read_of(&self, index: usize, decided: &BTreeMap<String, Treatment>) -> Vec<&TensorInfo> {
        let Some(Some(source)) = self.sources.get(index) else { return Vec::new() };
        let names = decided.iter().filter(|(_, treatment)| treatment.sources(self.recipe).contains(&index));
        names.flat_map(|(name, _)| stored(&*source.weights, name)).collect()
    }
}

fn head_tensors(layout: &Layout) -> BTreeSet<String> {
    layout.head.tensors().into_iter().map(str::to_owned).collect()
}

fn plan_source(recipe: &Recipe, index: usize, source: Source, decided: &BTreeMap<String, Treatment>, places: &mut Places) -> PlannedSource {
    let (path, origin, base_origin): (PathBuf, _, _) = match recipe.members().get(index) {
        Some(member) => (member.path.clone(), member.origin.clone(), member.base_origin.clone()),
        None => (recipe.init().map(Into::into).unwrap_or_default(), recipe.init_origin.clone(), None),
    };
    let taken = decided.iter().filter(|(_, treatment)| treatment.sources(recipe).contains(&index));
    let reads: Vec<String> = taken.map(|(name, _)| name.clone()).collect();
    let weights = places.track(&source.weights, &path);
    let (dtypes, bytes) = places.count(&weights, &reads);
    PlannedSource { path, origin, base_origin, dtypes, bytes, reads, weights, nested: source.nested }
}
