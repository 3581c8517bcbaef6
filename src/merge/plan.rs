//! The plan of a merge: a value made from headers and configurations alone, or every reason why there can be none.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::Merged;
use super::choice::{Treatment, group_of};
use super::nested::{Nested, Opening};
use super::places::Downloads;
use super::planned::{PlannedMember, PlannedSource};
use super::recipe::{Granularity, Kind, Method, Recipe, Rule, Take, dtype_name};
use super::survey::Survey;
use crate::checkpoint::remote::Remotes;
use crate::checkpoint::{Architecture, Checkpoint, CheckpointError, Layout, Manifest, SourceError, TensorSource, TextFacts};

/// What a plan takes from a checkpoint.
pub struct Input {
    pub weights: Arc<dyn TensorSource>,
    pub config: Value,
    /// A reward model must be of a family that this program knows; a policy need not be.
    pub architecture: Result<Architecture, CheckpointError>,
    /// Likewise.
    pub text: Result<TextFacts, CheckpointError>,
    /// What is worth knowing of it and forbids nothing.
    pub notes: Vec<String>,
    /// Why it has no reward head, where it has lost it.
    pub lost_head: Option<String>,
    pub(super) nested: Option<Arc<Nested>>,
}

impl From<Checkpoint> for Input {
    fn from(checkpoint: Checkpoint) -> Self {
        let (weights, config, architecture, text) = checkpoint.into_parts();
        Self { weights, config, architecture: Ok(architecture), text: Ok(text), notes: Vec::new(), lost_head: None, nested: None }
    }
}

/// Checkpoints that can be merged, and how. Its existence says: all members have the same architecture, tokenizer,
/// template and special tokens (but for what a member without reward head, or init, may differ in), and every tensor of
/// the merged model, with the same shape, but for those that a rule takes elsewhere.
pub struct MergePlan {
    pub(super) recipe: Recipe,
    pub(super) config: Value,
    pub(super) architecture: Result<Architecture, CheckpointError>,
    pub(super) text: Result<TextFacts, CheckpointError>,
    /// Of a reward model.
    pub(super) layout: Option<Layout>,
    pub(super) manifest: Manifest,
    /// For every tensor of the manifest.
    pub(super) treatments: BTreeMap<String, Treatment>,
    pub(super) members: Vec<PlannedMember>,
    pub(super) init: Option<PlannedSource>,
    pub(super) notes: Vec<String>,
}

/// What serving a merged reward model needs of its plan.
#[derive(Clone, Copy, Debug)]
pub struct Reward<'p> {
    pub architecture: &'p Architecture,
    /// The layout of the merged model.
    pub layout: &'p Layout,
    pub text: &'p TextFacts,
}

/// A merge that cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the recipe merges a policy (kind: policy), which can be planned, reported on and written, but has no reward to serve")]
pub struct NotServed;

/// Everything that forbids a merge, as sentences that name member, tensor or field, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct MergeError {
    pub problems: Vec<String>,
}

impl fmt::Display for MergeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [problem] => write!(f, "cannot merge: {problem}"),
            problems => {
                write!(f, "cannot merge, for {} reasons:", problems.len())?;
                problems.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
            }
        }
    }
}

impl MergePlan {
    /// Opens all checkpoints of a recipe, and the recipes that it leads to, and plans their merge. No weights are read, and
    /// nothing is fetched: a place that lies elsewhere is a mistake.
    pub fn open(recipe: &Recipe) -> Result<Self, MergeError> {
        Self::fetch(recipe, None, &mut |_, _, _| {})
    }

    /// The same after everything that lies elsewhere was fetched, also what recipes within the recipe name; the recipe of the
    /// plan has folders here, and where they came from. Blocks for as long as that takes.
    pub fn fetch(recipe: &Recipe, remotes: Option<&Remotes>, downloads: Downloads<'_>) -> Result<Self, MergeError> {
        let nowhere = |place: &str| CheckpointError::new(place, "nothing is fetched here, expected a folder");
        let mut fetch = |place: &str| {
            let remotes = remotes.ok_or_else(|| nowhere(place))?;
            remotes.fetch(place, &mut |done, total| downloads(place, done, total))
        };
        Opening::new(&mut fetch).plan(recipe)
    }

    /// Plans the merge of checkpoints that are given in the recipe's order. They are taken one by one, and only the first
    /// keeps its configuration and tokenizer, which take much memory.
    pub fn new(
        recipe: &Recipe,
        inputs: impl IntoIterator<Item = Result<Input, CheckpointError>>,
        init: Option<Result<Input, CheckpointError>>,
    ) -> Result<Self, MergeError> {
        let mut survey = Survey::new(recipe);
        let mut inputs = inputs.into_iter();
        for member in recipe.members() {
            survey.add(member, inputs.next());
        }
        survey.add_init(init);
        survey.finish()
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// `config.json` of the first member.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Tokenizer and templates of the first member, or why it has none, which only a policy may.
    pub fn text(&self) -> Result<&TextFacts, &CheckpointError> {
        self.text.as_ref()
    }

    /// What serving needs; a policy is never served.
    pub fn reward(&self) -> Result<Reward<'_>, NotServed> {
        match (&self.architecture, &self.layout, &self.text) {
            (Ok(architecture), Some(layout), Ok(text)) => Ok(Reward { architecture, layout, text }),
            _ => Err(NotServed),
        }
    }

    /// The merged tensors: those that a reward model reads, or all of a policy, in the recipe's dtype.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn members(&self) -> &[PlannedMember] {
        &self.members
    }

    /// The initialisation, where the recipe names one. It is read only if [`PlannedSource::reads`] is not empty.
    pub fn init(&self) -> Option<&PlannedSource> {
        self.init.as_ref()
    }

    /// How each merged tensor comes about.
    pub fn treatments(&self) -> impl Iterator<Item = (&str, Treatment)> {
        self.treatments.iter().map(|(name, treatment)| (name.as_str(), *treatment))
    }

    /// The tensors that the method decides, in the groups that SLERP turns as one; those of other methods by layer.
    pub fn groups(&self) -> BTreeMap<&str, Vec<&str>> {
        let granularity = match self.recipe.method() {
            Method::Slerp { granularity, .. } => granularity,
            Method::Linear | Method::Ema { .. } => Granularity::Layer,
        };
        let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, _) in self.treatments().filter(|(_, treatment)| *treatment == Treatment::Method) {
            groups.entry(group_of(name, granularity)).or_default().push(name);
        }
        groups
    }

    /// What is worth knowing and forbids nothing.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Parameters of the merged model.
    pub fn parameters(&self) -> u64 {
        self.manifest.iter().map(|(_, info)| info.elements() as u64).sum()
    }

    /// Bytes that the merge takes of all members and init; SLERP reads them twice.
    pub fn bytes_to_read(&self) -> u64 {
        self.sources().map(PlannedSource::bytes).sum()
    }

    /// Bytes of the merged tensors.
    pub fn merged_bytes(&self) -> u64 {
        self.manifest.iter().map(|(_, info)| info.bytes()).sum()
    }

    /// One member alone, as a merge of one in the same dtype; `None` beyond the last. A member that lacks tensors of the
    /// merged model is an error.
    pub fn member_source(self: &Arc<Self>, index: usize) -> Result<Option<Merged>, SourceError> {
        if index < self.members.len() { Merged::alone(Arc::clone(self), index).map(Some) } else { Ok(None) }
    }

    /// Members in order, then init: the order of all sums.
    pub(super) fn sources(&self) -> impl Iterator<Item = &PlannedSource> {
        self.members.iter().map(PlannedMember::source).chain(&self.init)
    }

    pub(super) fn source(&self, index: usize) -> Option<&PlannedSource> {
        self.members.get(index).map(PlannedMember::source).or(self.init.as_ref().filter(|_| index == self.members.len()))
    }
}

impl fmt::Display for MergePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (recipe, dtype) = (&self.recipe, dtype_name(self.recipe.dtype()).unwrap_or_default());
        let of = if recipe.kind() == Kind::Policy { " of a policy" } else { "" };
        writeln!(f, "{} merge{of} of {} members to {dtype}", Described(recipe), self.members.len())?;
        let names = self.members.iter().map(|member| member.name.as_str());
        let width = names.chain(self.init.iter().map(|_| "init")).map(str::len).max().unwrap_or_default();
        for member in &self.members {
            writeln!(f, "  {:width$}  {:.6}  {}", member.name.as_str(), member.coefficient, member.source)?;
        }
        if let Some(init) = &self.init {
            writeln!(f, "  {:width$}  {:8}  {init}", "init", "")?;
        }
        for (index, rule) in recipe.rules().iter().enumerate() {
            let count = self.treatments.values().filter(|treatment| **treatment == Treatment::Rule(index)).count();
            writeln!(f, "  {}: {}, {count} tensors", rule.pattern, Taken(recipe, rule))?;
        }
        let (tensors, parameters) = (self.manifest.len(), self.parameters());
        let (read, merged) = (Size(self.bytes_to_read()), Size(self.merged_bytes()));
        write!(f, "{tensors} tensors, {parameters} parameters: {read} to read, {merged} merged")?;
        self.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

/// A recipe's method with its numbers.
pub(super) struct Described<'r>(pub &'r Recipe);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.method().name())?;
        match self.0.method() {
            Method::Linear => {}
            Method::Slerp { granularity, t } if self.0.members().len() == 2 => write!(f, " (by {}, t {t})", granularity.name())?,
            Method::Slerp { granularity, .. } => write!(f, " (by {})", granularity.name())?,
            Method::Ema { mu } => write!(f, " (mu {mu})")?,
        }
        self.0.liti().map_or(Ok(()), |eta| write!(f, ", liti (eta {eta}),"))
    }
}

/// What a rule takes.
pub(super) struct Taken<'r>(pub &'r Recipe, pub &'r Rule);

impl fmt::Display for Taken<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.0.members();
        match &self.1.take {
            Take::From(index) => write!(f, "from {}", members.get(*index).map_or("?", |member| member.name.as_str())),
            Take::Init => f.write_str("from init"),
            Take::Mix(coefficients) => {
                let mixed = members.iter().zip(coefficients.as_slice()).filter(|(_, coefficient)| **coefficient != 0.0);
                let mixed: Vec<_> = mixed.map(|(member, coefficient)| format!("{coefficient:.6} {}", member.name)).collect();
                f.write_str(&mixed.join(" + "))
            }
        }
    }
}

impl fmt::Debug for MergePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MergePlan({self})")
    }
}

/// Bytes for people.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            bytes @ 0..1_000 => format!("{bytes} B"),
            bytes @ 1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
            bytes @ 1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
            bytes => format!("{:.2} GB", bytes as f64 / 1e9),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
