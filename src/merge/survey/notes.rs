//! What is worth knowing of a merge and forbids nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::Survey;
use crate::checkpoint::RECORD_KEY;
use crate::merge::choice::Treatment;
use crate::merge::listing::listed;
use crate::merge::recipe::Kind;

impl Survey<'_> {
    pub(super) fn note_the_unusual(&mut self, decided: &BTreeMap<String, Treatment>) {
        let mut notes = Vec::new();
        if !self.unused.is_empty() {
            let reason = match self.recipe.kind() {
                Kind::Reward => "the model does not read them",
                Kind::Policy => "programs compute them from the configuration",
            };
            notes.push(format!("left out, because {reason}: {}", listed(self.unused.iter().map(String::as_str))));
        }
        let read_alike = self.first.as_ref().and_then(|(label, first)| Some((label, &first.architecture.as_ref().ok()?.head.choice)));
        if let Some((label, choice)) = read_alike.filter(|(_, choice)| *choice != self.recipe.head()) {
            let choice = serde_json::Value::Object(choice.to_json());
            notes.push(format!("the head is read as the config.json of {label} records it ({RECORD_KEY}: {choice})"));
        }
        let members = self.recipe.members().len();
        let read = |index: usize| self.read_of(index, decided);
        let dtypes: BTreeSet<_> = (0..members).flat_map(read).map(|info| info.dtype).filter(|dtype| dtype.is_float()).collect();
        if dtypes.len() > 1 {
            let names: Vec<_> = dtypes.iter().map(|dtype| dtype.safetensors_name()).collect();
            notes.push(format!("members are stored in {}; they are averaged in float64", names.join(" and ")));
        }
        if self.recipe.members().iter().any(|member| member.coefficient < 0.0) || self.recipe.liti().is_some_and(|eta| eta < 0.0) {
            notes.push("a coefficient is negative: the result lies outside of the members (extrapolation)".to_owned());
        }
        if self.recipe.liti().is_some_and(|eta| eta > 1.0) {
            notes.push("liti goes beyond the merge (extrapolation)".to_owned());
        }
        for member in self.recipe.members().iter().filter(|member| member.coefficient == 0.0) {
            notes.push(format!("member {:?} has coefficient 0", member.name.as_str()));
        }
        if let Some(Some(init)) = self.sources.get(members) {
            if read(members).is_empty() {
                let method = self.recipe.method().name();
                notes.push(format!("init is checked but not read: a {method} merge does not depend on it"));
            }
            let lacks: Vec<&str> = decided.keys().map(String::as_str).filter(|name| init.get(name).is_none()).collect();
            if !lacks.is_empty() {
                notes.push(format!("init lacks {} tensors of the members: {}", lacks.len(), listed(lacks.iter().copied())));
            }
        }
        self.notes.append(&mut notes);
    }
}
