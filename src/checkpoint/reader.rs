//! Weights in safetensors files, read by position when they are asked for. Nothing is mapped into memory, so a file that
//! shrinks while it is served gives an error and never a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::manifest::{self, Header};
use super::names::BackboneNames;
use super::source::{FileStamp, look_up};
use super::{CheckpointError, Elements, Manifest, SourceError, TensorSource};

const MAX_INDEX_BYTES: u64 = manifest::MAX_HEADER_BYTES;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of one folder, kept open, so that a folder that is replaced while it is being served stays whole.
#[derive(Debug)]
pub struct Weights {
    shards: Vec<Shard>,
    manifest: Manifest,
    places: BTreeMap<String, Place>,
    /// The names in the files of tensors that have another name here.
    stored: BTreeMap<String, String>,
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
        Self { shards, manifest: tensors.into_iter().collect(), places, stored: BTreeMap::new() }
    }

    /// Opens one file, whatever its name.
    pub fn open_file(path: PathBuf) -> Result<Self, CheckpointError> {
        Ok(Self::new(vec![Shard::open(path)?]))
    }

    /// The same tensors under the names that the family's sequence classifier has for them.
    pub fn canonical(self, names: BackboneNames) -> Result<Self, CheckpointError> {
        let renamed = names.renamed(self.manifest.names()).map_err(|problem| {
            let file = self.shards.first().map(|shard| shard.path.display().to_string()).unwrap_or_default();
            CheckpointError::new(file, problem)
        })?;
        let name = |stored: &str| renamed.get(stored).cloned().unwrap_or_else(|| stored.to_owned());
        let manifest = self.manifest.iter().map(|(stored, info)| (name(stored), info.clone())).collect();
        let places = self.places.iter().map(|(stored, place)| (name(stored), *place)).collect();
        let stored = renamed.iter().map(|(&stored, name)| (name.clone(), stored.to_owned())).collect();
        Ok(Self { manifest, places, stored, shards: self.shards })
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
        let tensor = || self.stored.get(name).map_or(name, String::as_str).to_owned();
        read_exact_at(&shard.file, into.bytes_mut(), begin).map_err(|error| SourceError::Read {
            file: file(),
            tensor: tensor(),
            problem: shard.why(&error),
        })?;
        into.from_little_endian();
        match into.first_non_finite() {
            None => Ok(()),
            Some((index, value)) => Err(SourceError::NonFinite { file: file(), tensor: tensor(), index: range.start + index, value }),
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
pub(super) fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
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
