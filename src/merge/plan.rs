//! The plan of a merge: a value made from headers and configurations alone, or every reason why there can be none.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::Merged;
use super::content::Remembered;
use super::recipe::{Recipe, dtype_name};
use super::survey::Survey;
use crate::checkpoint::{Architecture, Checkpoint, CheckpointError, Dtype, Layout, Manifest, TensorSource, TextFacts};
use crate::domain::MemberName;

/// What a plan takes from a checkpoint.
pub struct Input {
    pub weights: Arc<dyn TensorSource>,
    pub config: Value,
    pub architecture: Architecture,
    pub text: TextFacts,
}

impl From<Checkpoint> for Input {
    fn from(checkpoint: Checkpoint) -> Self {
        let (weights, config, architecture, text) = checkpoint.into_parts();
        Self { weights, config, architecture, text }
    }
}

/// Checkpoints that can be merged, and how. Its existence says: all members have the same architecture, tokenizer,
/// template and special tokens, and every tensor that the model reads, with the same shape.
pub struct MergePlan {
    pub(super) recipe: Recipe,
    pub(super) config: Value,
    pub(super) architecture: Architecture,
    pub(super) text: TextFacts,
    pub(super) layout: Layout,
    pub(super) manifest: Manifest,
    pub(super) members: Vec<PlannedMember>,
    pub(super) notes: Vec<String>,
}

/// A member of a plan, with its weights at hand.
pub struct PlannedMember {
    pub(super) name: MemberName,
    pub(super) path: PathBuf,
    pub(super) coefficient: f64,
    pub(super) dtypes: BTreeSet<Dtype>,
    pub(super) bytes: u64,
    pub(super) weights: Remembered,
}

impl PlannedMember {
    pub fn name(&self) -> &MemberName {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Normalised: those of all members sum to 1.
    pub fn coefficient(&self) -> f64 {
        self.coefficient
    }

    /// What its tensors are stored in.
    pub fn dtypes(&self) -> &BTreeSet<Dtype> {
        &self.dtypes
    }

    /// Bytes that the merge reads of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

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
    /// Opens all checkpoints of a recipe and plans their merge. No weights are read.
    pub fn open(recipe: &Recipe) -> Result<Self, MergeError> {
        let open = |path: &Path| Checkpoint::open(path).map(Input::from);
        let members = recipe.members().iter().map(|member| open(&member.path));
        Self::new(recipe, members, recipe.init().map(open))
    }

    /// Plans the merge of checkpoints that are given in the recipe's order. They are taken one by one, and only the first
    /// keeps its configuration and tokenizer, which take much memory.
    pub fn new(
        recipe: &Recipe,
        inputs: impl IntoIterator<Item = Result<Input, CheckpointError>>,
        init: Option<Result<Input, CheckpointError>>,
    ) -> Result<Self, MergeError> {
        let mut survey = Survey::default();
        let mut inputs = inputs.into_iter();
        for member in recipe.members() {
            match inputs.next() {
                Some(Ok(mut input)) => {
                    input.architecture.head.choice = recipe.head().clone();
                    survey.add(member, input);
                }
                Some(Err(error)) => survey.problems.push(format!("member {:?}: {error}", member.name.as_str())),
                None => survey.problems.push(format!("member {:?}: no checkpoint was given for it", member.name.as_str())),
            }
        }
        if let Some(mut init) = init {
            if let Ok(init) = &mut init {
                init.architecture.head.choice = recipe.head().clone();
            }
            survey.add_init(init);
        }
        survey.finish(recipe)
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// `config.json` of the first member.
    pub fn config(&self) -> &Value {
        &self.config
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    pub fn text(&self) -> &TextFacts {
        &self.text
    }

    /// The layout of the merged model, and of each member.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The merged tensors: those that the model reads, in the recipe's dtype.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn members(&self) -> &[PlannedMember] {
        &self.members
    }

    /// What is worth knowing and forbids nothing.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Parameters of the merged model.
    pub fn parameters(&self) -> u64 {
        self.manifest.iter().map(|(_, info)| info.elements() as u64).sum()
    }

    /// Bytes of all members that the merge reads.
    pub fn bytes_to_read(&self) -> u64 {
        self.members.iter().map(PlannedMember::bytes).sum()
    }

    /// Bytes of the merged tensors.
    pub fn merged_bytes(&self) -> u64 {
        self.manifest.iter().map(|(_, info)| info.bytes()).sum()
    }

    /// One member alone, as a merge of one in the same dtype; `None` beyond the last.
    pub fn member_source(self: &Arc<Self>, index: usize) -> Option<Merged> {
        (index < self.members.len()).then(|| Merged::alone(Arc::clone(self), index))
    }
}

impl fmt::Display for MergePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = dtype_name(self.recipe.dtype()).unwrap_or_default();
        writeln!(f, "{} merge of {} members to {dtype}", self.recipe.method().name(), self.members.len())?;
        let width = self.members.iter().map(|member| member.name.as_str().len()).max().unwrap_or_default();
        for member in &self.members {
            let dtypes: Vec<_> = member.dtypes.iter().map(|dtype| dtype.safetensors_name()).collect();
            let (name, coefficient, size) = (member.name.as_str(), member.coefficient, Size(member.bytes));
            writeln!(f, "  {name:width$}  {coefficient:.6}  {size:>9}  {}  {}", dtypes.join("+"), member.path.display())?;
        }
        let (tensors, parameters) = (self.manifest.len(), self.parameters());
        let (read, merged) = (Size(self.bytes_to_read()), Size(self.merged_bytes()));
        write!(f, "{tensors} tensors, {parameters} parameters: {read} to read, {merged} merged")?;
        self.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

impl fmt::Debug for MergePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MergePlan({self})")
    }
}

impl fmt::Debug for PlannedMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlannedMember({}, {})", self.name, self.path.display())
    }
}

/// Bytes for people.
struct Size(u64);

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
