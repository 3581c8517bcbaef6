//! A checkpoint folder, opened: its configuration, its tokenizer, and its weights, whichever way they lie there.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::adapter;
use super::names::BackboneNames;
use super::reader::{INDEX, SINGLE, Weights, read_capped};
use super::{Architecture, CheckpointError, Elements, FileStamp, Manifest, SourceError, TensorSource, TextFacts};

/// More than any real `config.json` has by a factor of a hundred.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

pub(super) const CONFIG: &str = "config.json";

/// A checkpoint folder of any family: what this program cannot read of its configuration or its tokenizer is told to
/// whoever needs that. Opening reads headers and configurations only.
pub struct Folder {
    /// `config.json`; that of an adapter's base, with what the adapter changes of it.
    pub config: Value,
    /// Under the names that the family's sequence classifier has for them.
    pub weights: Arc<dyn TensorSource>,
    pub architecture: Result<Architecture, CheckpointError>,
    pub text: Result<TextFacts, CheckpointError>,
    /// Sentences that are worth knowing and forbid nothing.
    pub notes: Vec<String>,
    /// Why there is no reward head, where an adapter has lost it.
    pub lost_head: Option<String>,
}

impl Folder {
    /// Opens a folder and checks all that can be known without reading weights: a checkpoint, or a LoRA adapter, which stands on
    /// `base` or on what its own configuration names.
    pub fn open(dir: &Path, base: Option<&Path>) -> Result<Self, CheckpointError> {
        let wrong = |problem: String| Err(CheckpointError::new(dir.display(), problem));
        match kind(dir)? {
            Kind::Adapter => adapter::open(dir, base),
            Kind::Full => match base {
                Some(base) => wrong(format!("is no LoRA adapter, so it stands on no base; found base {:?}", base.display().to_string())),
                None => Self::open_full(dir, "the checkpoint").map(|(folder, _)| folder),
            },
        }
    }

    /// Opens what must be a checkpoint of its own, in full precision; `what` it is, in words.
    pub(super) fn open_full(dir: &Path, what: &str) -> Result<(Self, Arc<Weights>), CheckpointError> {
        if kind(dir)? == Kind::Adapter {
            return Err(CheckpointError::new(dir.display(), "is a LoRA adapter, expected a checkpoint of its own"));
        }
        let config = read_object(&dir.join(CONFIG))?;
        if let Some(Value::Object(quantised)) = config.get("quantization_config") {
            let method = quantised.get("quant_method").and_then(Value::as_str).unwrap_or("by no named method");
            let problem = format!(
                "quantization_config: {what} is quantised ({method}), expected the checkpoint that it was quantised from: FP8 and other \
                 quantised weights are not done"
            );
            return Err(CheckpointError::new(dir.join(CONFIG).display(), problem));
        }
        let names = BackboneNames::of(config.get("model_type").and_then(Value::as_str).unwrap_or_default());
        let weights = Arc::new(Weights::open(dir)?.canonical(names)?);
        let architecture = parse_architecture(dir, &config);
        let text = TextFacts::open(dir);
        let source = Arc::clone(&weights) as Arc<dyn TensorSource>;
        Ok((Self { config, weights: source, architecture, text, notes: Vec::new(), lost_head: None }, weights))
    }
}

pub(super) fn parse_architecture(dir: &Path, config: &Value) -> Result<Architecture, CheckpointError> {
    Architecture::parse(config).map_err(|problems| CheckpointError::new(dir.join(CONFIG).display(), problems.join("; ")))
}

/// A JSON file of an object.
pub(super) fn read_object(path: &Path) -> Result<Value, CheckpointError> {
    let bytes = read_capped(path, MAX_CONFIG_BYTES)?;
    let config: Value =
        serde_json::from_slice(&bytes).map_err(|error| CheckpointError::new(path.display(), format!("is not valid JSON: {error}")))?;
    if config.is_object() { Ok(config) } else { Err(CheckpointError::new(path.display(), "expected a JSON object")) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    Adapter,
}

/// What lies in a folder. An adapter may have been saved beside the `config.json` of its base, but not beside weights: PEFT and
/// transformers then disagree about which of the two the folder is.
fn kind(dir: &Path) -> Result<Kind, CheckpointError> {
    let wrong = |problem: String| Err(CheckpointError::new(dir.display(), problem));
    match std::fs::metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return wrong("there is no such folder".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return wrong("is a file, expected a checkpoint folder".to_owned()),
        Err(error) => return wrong(format!("cannot be opened: {error}")),
        Ok(found) if !found.is_dir() => return wrong("is a file, expected a checkpoint folder".to_owned()),
        Ok(_) => {}
    }
    let has = |file: &str| dir.join(file).exists();
    let weights = [SINGLE, INDEX].into_iter().find(|file| has(file));
    match (has(adapter::CONFIG), weights) {
        (true, None) => Ok(Kind::Adapter),
        (true, Some(weights)) => wrong(format!(
            "holds both a LoRA adapter ({}) and whole weights ({weights}), expected one of them: transformers would apply the adapter to its \
             base, and others would take the weights",
            adapter::CONFIG
        )),
        (false, _) if has(CONFIG) => Ok(Kind::Full),
        (false, _) => wrong(
            "has no config.json; expected a Hugging Face checkpoint folder with config.json, model.safetensors \
             (or its shards and index) and tokenizer.json, or a LoRA adapter with adapter_config.json"
                .to_owned(),
        ),
    }
}

impl fmt::Debug for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folder").field("architecture", &self.architecture).field("notes", &self.notes).finish_non_exhaustive()
    }
}

/// A folder of a family that can be served, with its tokenizer.
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    architecture: Architecture,
    text: TextFacts,
    weights: Arc<dyn TensorSource>,
}

impl Checkpoint {
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let Folder { config, weights, architecture, text, .. } = Folder::open(dir, None)?;
        Ok(Self { path: dir.to_owned(), config, architecture: architecture?, text: text?, weights })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json` as it stands in the folder.
    pub fn config(&self) -> &Value {
        &self.config
    }

    pub fn text(&self) -> &TextFacts {
        &self.text
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Takes the folder's parts: weights, config, architecture, text facts.
    pub fn into_parts(self) -> (Arc<dyn TensorSource>, Value, Architecture, TextFacts) {
        (self.weights, self.config, self.architecture, self.text)
    }
}

impl TensorSource for Checkpoint {
    fn manifest(&self) -> &Manifest {
        self.weights.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.weights.read(name, range, into)
    }

    fn files(&self) -> Option<Vec<FileStamp>> {
        self.weights.files()
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).finish_non_exhaustive()
    }
}
