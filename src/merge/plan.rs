//! The plan of a merge: a value made from headers and configurations alone, or every reason why there can be none.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::content::Remembered;
use super::recipe::{Recipe, dtype_name};
use super::{Member, Merged, Method};
use crate::checkpoint::{Architecture, Checkpoint, CheckpointError, Dtype, Layout, Manifest, TensorInfo, TensorSource, TextFacts};
use crate::domain::MemberName;

/// How many tensors are listed for one reason before the rest is counted.
const LISTED: usize = 20;

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
    recipe: Recipe,
    config: Value,
    architecture: Architecture,
    text: TextFacts,
    layout: Layout,
    manifest: Manifest,
    members: Vec<PlannedMember>,
    notes: Vec<String>,
}

/// A member of a plan, with its weights at hand.
pub struct PlannedMember {
    name: MemberName,
    path: PathBuf,
    coefficient: f64,
    dtypes: BTreeSet<Dtype>,
    bytes: u64,
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
                Some(Ok(input)) => survey.add(member, input),
                Some(Err(error)) => survey.problems.push(format!("member {:?}: {error}", member.name.as_str())),
                None => survey.problems.push(format!("member {:?}: no checkpoint was given for it", member.name.as_str())),
            }
        }
        if let Some(init) = init {
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

/// What is known after some of the members.
#[derive(Default)]
struct Survey {
    problems: Vec<String>,
    /// The first member that could be opened; all others are compared to it.
    first: Option<First>,
    /// The first member whose tensors are all there, and their shapes.
    reference: Option<Reference>,
    accepted: Vec<(Member, Arc<dyn TensorSource>)>,
    unused: BTreeSet<String>,
    dtypes: BTreeSet<Dtype>,
    init_lacks: Vec<String>,
    init_notes: Vec<String>,
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
    fn add(&mut self, member: &Member, input: Input) {
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
                if self.reference.is_none() {
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
    fn add_init(&mut self, init: Result<Input, CheckpointError>) {
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

    fn finish(self, recipe: &Recipe) -> Result<MergePlan, MergeError> {
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
        notes.extend(self.init_notes.iter().cloned());
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
