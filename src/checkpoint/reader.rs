//! A checkpoint folder, opened: facts in memory, weights read by position when they are asked for. Nothing is mapped into
//! memory, so a file that shrinks while it is served gives an error and never a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::manifest::{self, Header};
use super::source::{FileStamp, look_up};
use super::{Architecture, CheckpointError, Elements, Manifest, SourceError, TensorSource, TextFacts};

/// More than any real `config.json` has by a factor of a hundred.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_INDEX_BYTES: u64 = manifest::MAX_HEADER_BYTES;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A Hugging Face checkpoint folder: `config.json`, the tokenizer's files, and weights in one or several safetensors
/// files. Opening reads headers and configs only.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    architecture: Architecture,
    text: TextFacts,
    weights: Arc<Weights>,
}

/// A checkpoint folder of any family: what this program cannot read of its configuration or its tokenizer is told to
/// whoever needs that.
#[derive(Debug)]
pub struct Folder {
    pub config: Value,
    pub weights: Arc<Weights>,
    pub architecture: Result<Architecture, CheckpointError>,
    pub text: Result<TextFacts, CheckpointError>,
}

impl Folder {
    /// Opens a folder and checks all that can be known without reading weights.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        check_folder(dir)?;
        let config = read_config(dir)?;
        let weights = Arc::new(Weights::open(dir)?);
        let architecture =
            Architecture::parse(&config).map_err(|problems| CheckpointError::new(dir.join("config.json").display(), problems.join("; ")));
        Ok(Self { config, weights, architecture, text: TextFacts::open(dir) })
    }
}

impl Checkpoint {
    /// Opens a folder of a family that can be served, with its tokenizer.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let Folder { config, weights, architecture, text } = Folder::open(dir)?;
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

    /// The tensors alone, without the memory that config and tokenizer take.
    pub fn weights(&self) -> Arc<Weights> {
        Arc::clone(&self.weights)
    }

    /// Takes the folder's parts: weights, config, architecture, text facts.
    pub fn into_parts(self) -> (Arc<Weights>, Value, Architecture, TextFacts) {
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

/// The safetensors files of one folder, kept open, so that a folder that is replaced while it is being served stays whole.
#[derive(Debug)]
pub struct Weights {
    shards: Vec<Shard>,
    manifest: Manifest,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// Where a tensor's bytes begin: which shard, and which byte of its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    shard: usize,
    begin: u64,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, and checks all headers.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let (shard, header, data_begin) = Shard::open(single)?;
            return Ok(Self::new(vec![(shard, header, data_begin)]));
        }
        let index_path = dir.join(INDEX);
        if !index_path.exists() {
            return Err(no_weights(dir));
        }
        let in_index = |problem: String| CheckpointError::new(index_path.display(), problem);
        let index = manifest::parse_index(&read_capped(&index_path, MAX_INDEX_BYTES)?).map_err(in_index)?;
        let mut shards = Vec::new();
        let mut headers = BTreeMap::new();
        let mut names: Vec<&String> = index.values().collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let (shard, header, data_begin) = Shard::open(dir.join(name))?;
            headers.insert(name.clone(), header);
            shards.push((shard, name, data_begin));
        }
        manifest::unify(&index, &headers).map_err(in_index)?;
        let with_header = |(shard, name, data_begin)| (shard, headers.remove(name).unwrap_or_default(), data_begin);
        Ok(Self::new(shards.into_iter().map(with_header).collect()))
    }

    fn new(parts: Vec<(Shard, Header, u64)>) -> Self {
        let (mut shards, mut tensors, mut places) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (index, (shard, header, data_begin)) in parts.into_iter().enumerate() {
            for (name, entry) in header.tensors {
                places.insert(name.clone(), Place { shard: index, begin: data_begin + entry.begin });
                tensors.push((name, entry.info));
            }
            shards.push(shard);
        }
        Self { shards, manifest: tensors.into_iter().collect(), places }
    }
}

impl TensorSource for Weights {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let info = look_up(&self.manifest, name, &range)?;
        let missing = || SourceError::NoSuchTensor { tensor: name.to_owned(), problem: "it has no place in a file".to_owned() };
        let place = self.places.get(name).ok_or_else(missing)?;
        let shard = self.shards.get(place.shard).ok_or_else(missing)?;
        into.reset(info.dtype, range.len());
        let begin = place.begin + range.start as u64 * info.dtype.size() as u64;
        let file = || shard.path.display().to_string();
        read_exact_at(&shard.file, into.bytes_mut(), begin).map_err(|error| SourceError::Read {
            file: file(),
            tensor: name.to_owned(),
            problem: shard.why(&error),
        })?;
        into.from_little_endian();
        match into.first_non_finite() {
            None => Ok(()),
            Some((index, value)) => {
                Err(SourceError::NonFinite { file: file(), tensor: name.to_owned(), index: range.start + index, value })
            }
        }
    }

    fn files(&self) -> Option<Vec<FileStamp>> {
        self.shards.iter().map(|shard| FileStamp::of(&shard.path, &shard.file).ok()).collect()
    }
}

impl Shard {
    /// The shard, its header, and the byte at which its data begins.
    fn open(path: PathBuf) -> Result<(Self, Header, u64), CheckpointError> {
        let wrong = |problem: String| CheckpointError::new(path.display(), problem);
        let cannot_read = |error: io::Error| CheckpointError::new(path.display(), format!("cannot be read: {error}"));
        let (file, bytes) = open_file(&path)?;
        let mut first = [0; 8];
        if bytes < 8 {
            return Err(wrong(format!("has {bytes} bytes, expected at least the 8 that begin a safetensors file")));
        }
        read_exact_at(&file, &mut first, 0).map_err(cannot_read)?;
        let header_bytes = manifest::header_bytes(first, bytes).map_err(wrong)?;
        let mut json = vec![0; header_bytes];
        read_exact_at(&file, &mut json, 8).map_err(cannot_read)?;
        let data_begin = 8 + header_bytes as u64;
        let header = manifest::parse_header(&json, bytes - data_begin).map_err(wrong)?;
        Ok((Self { path, file, bytes }, header, data_begin))
    }

    /// What a failed read says: most often the file has changed since its header was checked.
    fn why(&self, error: &io::Error) -> String {
        match self.file.metadata() {
            Ok(now) if now.len() != self.bytes => {
                format!("the file has {} bytes, but had {} when it was opened; it was changed while in use", now.len(), self.bytes)
            }
            _ => format!("cannot be read: {error}"),
        }
    }
}

fn check_folder(dir: &Path) -> Result<(), CheckpointError> {
    let wrong = |problem: String| Err(CheckpointError::new(dir.display(), problem));
    match std::fs::metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => wrong("there is no such folder".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => wrong("is a file, expected a checkpoint folder".to_owned()),
        Err(error) => wrong(format!("cannot be opened: {error}")),
        Ok(found) if !found.is_dir() => wrong("is a file, expected a checkpoint folder".to_owned()),
        Ok(_) if dir.join("config.json").exists() => Ok(()),
        Ok(_) if dir.join("adapter_config.json").exists() => wrong(
            "is a LoRA adapter (adapter_config.json without config.json); LoRA adapters are not supported yet, \
             merge it into its base first (PEFT: merge_and_unload)"
                .to_owned(),
        ),
        Ok(_) => wrong(
            "has no config.json; expected a Hugging Face checkpoint folder with config.json, model.safetensors \
             (or its shards and index) and tokenizer.json"
                .to_owned(),
        ),
    }
}

fn read_config(dir: &Path) -> Result<Value, CheckpointError> {
    let path = dir.join("config.json");
    let bytes = read_capped(&path, MAX_CONFIG_BYTES)?;
    let config: Value =
        serde_json::from_slice(&bytes).map_err(|error| CheckpointError::new(path.display(), format!("is not valid JSON: {error}")))?;
    if config.is_object() { Ok(config) } else { Err(CheckpointError::new(path.display(), "expected a JSON object")) }
}

/// Says what lies in a folder in place of safetensors weights.
fn no_weights(dir: &Path) -> CheckpointError {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort_unstable();
    let pickle =
        |name: &&String| [".bin", ".pt", ".pth", ".ckpt", ".pkl"].iter().any(|end| name.ends_with(end)) || name.contains(".bin.index");
    if let Some(name) = names.iter().find(pickle) {
        let problem = format!(
            "holds pickled weights ({name}), which are never loaded because loading a pickle runs code; convert them once in Python: \
             AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
        );
        return CheckpointError::new(dir.display(), problem);
    }
    let found: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).take(3).collect();
    let also = if found.is_empty() { String::new() } else { format!("; found {found:?}") };
    CheckpointError::new(dir.display(), format!("has no weights: expected {SINGLE} or {INDEX}{also}"))
}

/// Opens a regular file and gives its length. Anything else (a folder, a pipe that would block) is refused first.
fn open_file(path: &Path) -> Result<(File, u64), CheckpointError> {
    let cannot = |error: io::Error| {
        let problem = match error.kind() {
            io::ErrorKind::NotFound => "there is no such file".to_owned(),
            _ => format!("cannot be opened: {error}"),
        };
        CheckpointError::new(path.display(), problem)
    };
    let found = std::fs::metadata(path).map_err(cannot)?;
    if !found.is_file() {
        let what = if found.is_dir() { "is a folder" } else { "is not a regular file" };
        return Err(CheckpointError::new(path.display(), format!("{what}, expected a file")));
    }
    let file = File::open(path).map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    Ok((file, bytes))
}

/// Reads a small file whole; one of more than `limit` bytes is refused.
fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, bytes) = open_file(path)?;
    if bytes > limit {
        return Err(CheckpointError::new(path.display(), format!("has {bytes} bytes, expected at most {limit}")));
    }
    let mut content = Vec::new();
    file.take(limit).read_to_end(&mut content).map_err(|error| CheckpointError::new(path.display(), format!("cannot be read: {error}")))?;
    Ok(content)
}

#[cfg(unix)]
fn read_exact_at(file: &File, into: &mut [u8], begin: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, begin)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut into: &mut [u8], mut begin: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !into.is_empty() {
        match file.seek_read(into, begin) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                into = &mut into[count..];
                begin += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
