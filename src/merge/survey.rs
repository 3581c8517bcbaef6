//! What the members of a recipe say together, one after the other: the making of a plan.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;

use super::content::Remembered;
use super::heads;
use super::plan::{Input, MergeError, MergePlan, PlannedMember};
use super::recipe::{Member, Method, Recipe};
use crate::checkpoint::{Architecture, CheckpointError, Dtype, Layout, Manifest, TensorInfo, TensorSource, TextFacts};
use crate::domain::MemberName;

/// How many tensors are listed for one reason before the rest is counted.
const LISTED: usize = 20;

/// What is known after some of the members.
#[derive(Default)]
pub struct Survey {
    pub problems: Vec<String>,
    /// The first member that could be opened; all others are compared to it.
    first: Option<First>,
    /// The first member whose tensors are all there, and their shapes.
    reference: Option<Reference>,
    accepted: Vec<(Member, Arc<dyn TensorSource>)>,
    unused: BTreeSet<String>,
    dtypes: BTreeSet<Dtype>,
    init_lacks: Vec<String>,
    init_notes: Vec<String>,
    head_notes: Vec<String>,
}

struct First {
    name: MemberName,
    config: Value,
    architecture: Architecture,
    text: TextFacts,
}

struct Reference {
    name: MemberName,
    layout: Layout,
    weights: Arc<dyn TensorSource>,
}

impl Survey {
    pub fn add(&mut self, member: &Member, input: Input) {
        let name = member.name.as_str();
        let Input { weights, config, architecture, text } = input;
        if let Some(first) = &self.first {
            let differences = first.architecture.differences(&architecture).into_iter().chain(first.text.differences(&text));
            let sentence = |difference| format!("member {name:?} differs from member {:?}: {difference}", first.name.as_str());
            self.problems.extend(differences.map(sentence));
        }
        match Layout::new(&architecture, weights.manifest()) {
            Err(problems) => self.problems.extend(problems.into_iter().map(|problem| format!("member {name:?}: {problem}"))),
            Ok(layout) => {
                self.unused.extend(layout.unused().iter().cloned());
                self.check_tensors(name, &layout, weights.manifest());
                self.head_notes.extend(heads::notes(name, &architecture));
                if let Some(reference) = &self.reference {
                    let found = heads::differences((&reference.layout, reference.weights.as_ref()), (&layout, weights.as_ref()));
                    let other = reference.name.as_str();
                    self.problems
                        .extend(found.into_iter().map(|problem| format!("member {name:?} differs from member {other:?}: {problem}")));
                } else {
                    self.reference = Some(Reference { name: member.name.clone(), layout, weights: Arc::clone(&weights) });
                }
            }
        }
        if self.first.is_none() {
            self.first = Some(First { name: member.name.clone(), config, architecture, text });
        }
        self.accepted.push((member.clone(), weights));
    }

    fn check_tensors(&mut self, name: &str, layout: &Layout, manifest: &Manifest) {
        let used: BTreeSet<&str> = layout.used().iter().map(String::as_str).collect();
        let mut integers = Listing::default();
        for &tensor in &used {
            if let Some(info) = manifest.get(tensor) {
                if info.dtype.is_float() {
                    self.dtypes.insert(info.dtype);
                } else {
                    integers
                        .push(format!("member {name:?}: tensor {tensor:?} is {}, expected floating-point numbers to average", info.dtype));
                }
            }
        }
        integers.finish(name, &mut self.problems);
        let Some(reference) = &self.reference else { return };
        let (other, expected) = (reference.name.as_str(), reference.layout.used());
        let (mut missing, mut extra, mut shapes) = (Listing::default(), Listing::default(), Listing::default());
        for tensor in expected.iter().filter(|tensor| !used.contains(tensor.as_str())) {
            missing.push(format!("member {name:?}: tensor {tensor:?} is missing, member {other:?} has it"));
        }
        for &tensor in &used {
            let (Some(found), Ok(_)) = (manifest.get(tensor), expected.binary_search_by(|known| known.as_str().cmp(tensor))) else {
                extra.push(format!("member {name:?}: tensor {tensor:?} is extra, member {other:?} does not have it"));
                continue;
            };
            if let Some(known) = reference.weights.manifest().get(tensor).filter(|known| known.shape != found.shape) {
                shapes.push(format!(
                    "member {name:?}: tensor {tensor:?} has shape {:?}, expected {:?} as in member {other:?}",
                    found.shape, known.shape
                ));
            }
        }
        for listing in [missing, extra, shapes] {
            listing.finish(name, &mut self.problems);
        }
    }

    /// A linear merge does not read the initialisation. It must be the same model, or "shared" would be untrue, but it may
    /// lack tensors (the policy it comes from has no reward head) and may have another template.
    pub fn add_init(&mut self, init: Result<Input, CheckpointError>) {
        let input = match init {
            Ok(input) => input,
            Err(error) => return self.problems.push(format!("init: {error}")),
        };
        if let Some(first) = &self.first {
            let name = first.name.as_str();
            let differences = first.architecture.differences(&input.architecture);
            self.problems.extend(differences.into_iter().map(|difference| format!("init differs from member {name:?}: {difference}")));
            let differences = first.text.differences(&input.text);
            self.init_notes.extend(differences.into_iter().map(|difference| format!("init differs from member {name:?}: {difference}")));
        }
        let Some(reference) = &self.reference else { return };
        let mut shapes = Listing::default();
        for tensor in reference.layout.used() {
            match (input.weights.manifest().get(tensor), reference.weights.manifest().get(tensor)) {
                (None, _) => self.init_lacks.push(tensor.clone()),
                (Some(found), Some(expected)) if found.shape != expected.shape => shapes.push(format!(
                    "init: tensor {tensor:?} has shape {:?}, expected {:?} as in member {:?}",
                    found.shape,
                    expected.shape,
                    reference.name.as_str()
                )),
                _ => {}
            }
        }
        shapes.finish("init", &mut self.problems);
    }

    pub fn finish(self, recipe: &Recipe) -> Result<MergePlan, MergeError> {
        let notes = self.notes(recipe);
        let (Some(first), Some(reference), true) = (self.first, self.reference, self.problems.is_empty()) else {
            return Err(MergeError { problems: self.problems });
        };
        let used = reference.layout.used();
        let merged = |name: &String| {
            let shape = reference.weights.manifest().get(name)?.shape.clone();
            Some((name.clone(), TensorInfo { dtype: recipe.dtype(), shape }))
        };
        let manifest = used.iter().filter_map(merged).collect();
        let planned = |(member, weights): (Member, Arc<dyn TensorSource>)| {
            let infos: Vec<&TensorInfo> = used.iter().filter_map(|name| weights.manifest().get(name)).collect();
            let dtypes = infos.iter().map(|info| info.dtype).collect();
            let bytes = infos.iter().map(|info| info.bytes()).sum();
            let place = member.path.display().to_string();
            let weights = Remembered::new(Arc::clone(&weights), place, used);
            PlannedMember { name: member.name, path: member.path, coefficient: member.coefficient, dtypes, bytes, weights }
        };
        let members = self.accepted.into_iter().map(planned).collect();
        Ok(MergePlan {
            recipe: recipe.clone(),
            config: first.config,
            architecture: first.architecture,
            text: first.text,
            layout: reference.layout,
            manifest,
            members,
            notes,
        })
    }

    fn notes(&self, recipe: &Recipe) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.unused.is_empty() {
            let names = self.unused.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = if self.unused.len() > LISTED { format!(" and {} more", self.unused.len() - LISTED) } else { String::new() };
            notes.push(format!("left out, because the model does not read them: {names}{more}"));
        }
        if self.dtypes.len() > 1 {
            let names: Vec<_> = self.dtypes.iter().map(|dtype| dtype.safetensors_name()).collect();
            notes.push(format!("members are stored in {}; they are averaged in float64", names.join(" and ")));
        }
        if recipe.members().iter().any(|member| member.coefficient < 0.0) {
            notes.push("a coefficient is negative: the result lies outside of the members (extrapolation)".to_owned());
        }
        if recipe.init().is_some() {
            match recipe.method() {
                Method::Linear => notes.push("init is checked but not read: a linear merge does not depend on it".to_owned()),
            }
        }
        if !self.init_lacks.is_empty() {
            let names = self.init_lacks.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
            notes.push(format!("init lacks {} tensors of the members: {names}", self.init_lacks.len()));
        }
        notes.extend(self.init_notes.iter().chain(&self.head_notes).cloned());
        notes
    }
}

/// Sentences of one kind about one member: the first are listed, the rest is counted.
#[derive(Default)]
struct Listing {
    sentences: Vec<String>,
    count: usize,
}

impl Listing {
    fn push(&mut self, sentence: String) {
        self.count += 1;
        if self.count <= LISTED {
            self.sentences.push(sentence);
        }
    }

    fn finish(self, name: &str, problems: &mut Vec<String>) {
        problems.extend(self.sentences);
        if self.count > LISTED {
            problems.push(format!("{name:?}: and {} more tensors like the last", self.count - LISTED));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_of_tensors_is_cut_and_counted() {
        let mut listing = Listing::default();
        (0..27).for_each(|index| listing.push(format!("problem {index}")));
        let mut problems = Vec::new();
        listing.finish("a", &mut problems);
        let last = problems[20].as_str();
        assert_eq!((problems.len(), problems[19].as_str(), last), (21, "problem 19", "\"a\": and 7 more tensors like the last"));
    }
}
