//! The making of an entry, beside a load that reads the same weights anyway.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use super::{ENTRY, Entry, checksum};
use crate::checkpoint::{CHUNK_ELEMENTS, Elements, Manifest, SourceError, TensorSource};
use crate::domain::WeightsId;
use crate::lock::lock;
use crate::merge::Merged;
use crate::merge::content::Remembered;
use crate::merge::shards::{self, Metadata};
use crate::merge::staging::{FileError, Staging};
use crate::merge::write::write_all_at;

/// A merge that is written down while it is read.
pub struct Recorder {
    source: Remembered,
    staging: Staging,
    path: PathBuf,
    file: File,
    /// Where each tensor begins in the file.
    places: BTreeMap<String, u64>,
    /// Elements of each tensor that were written.
    written: Mutex<BTreeMap<String, usize>>,
    failure: OnceLock<FileError>,
}

impl Recorder {
    pub(super) fn new(staging: Staging, merged: &Arc<Merged>) -> Result<Self, FileError> {
        let manifest = merged.manifest();
        let mut places = BTreeMap::new();
        let (mut path, mut file) = (None, None);
        // One file holds everything: the limit is the largest number there is.
        for shard in shards::split(manifest, u64::MAX) {
            let header = shard.header(&Metadata::from([("format".to_owned(), "pt".to_owned())]), 0);
            let (at, to) = staging.create(&shard.file)?;
            write_all_at(&to, &header, 0).map_err(|error| cannot_write(&at, &error))?;
            let mut begin = header.len() as u64;
            for (name, info) in shard.tensors {
                places.insert(name, begin);
                begin += info.bytes();
            }
            (path, file) = (Some(at), Some(to));
        }
        let (Some(path), Some(file)) = (path, file) else { return Err(FileError::new(staging.folder(), "has no file")) };
        let source = Remembered::new(Arc::clone(merged) as Arc<dyn TensorSource>, "the merge".to_owned());
        Ok(Self { source, staging, path, file, places, written: Mutex::default(), failure: OnceLock::new() })
    }

    fn write(&self, name: &str, range: &Range<usize>, elements: &Elements) -> Result<(), FileError> {
        let Some(begin) = self.places.get(name) else { return Ok(()) };
        let size = elements.bytes().len() / range.len().max(1);
        let begin = begin + (range.start * size) as u64;
        elements.with_little_endian(|bytes| write_all_at(&self.file, bytes, begin)).map_err(|error| cannot_write(&self.path, &error))?;
        *lock(&self.written).entry(name.to_owned()).or_default() += range.len();
        Ok(())
    }

    /// Writes what nobody has read, syncs, and adds what is said about the entry.
    pub(super) fn finish(self, weights_id: WeightsId, notes: Vec<String>) -> Result<Staging, FileError> {
        if let Some(failure) = self.failure.get() {
            return Err(failure.clone());
        }
        let written = std::mem::take(&mut *lock(&self.written));
        let cannot = |error: SourceError| FileError::new(&self.path, error);
        let mut elements = Elements::default();
        for (name, info) in self.source.manifest().iter().filter(|(name, info)| written.get(*name) != Some(&info.elements())) {
            for begin in (0..info.elements()).step_by(CHUNK_ELEMENTS) {
                let range = begin..info.elements().min(begin + CHUNK_ELEMENTS);
                self.source.read(name, range.clone(), &mut elements).map_err(cannot)?;
                self.write(name, &range, &elements)?;
            }
        }
        self.file.sync_all().map_err(|error| cannot_write(&self.path, &error))?;
        let entry = Entry {
            weights_id: weights_id.to_string(),
            checksum: checksum(&self.source).map_err(cannot)?,
            notes,
            warm_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let text = serde_json::to_string(&entry).map_err(|error| FileError::new(&self.path, error))?;
        self.staging.write(ENTRY, text.as_bytes())?;
        Ok(self.staging)
    }
}

impl TensorSource for Recorder {
    fn manifest(&self) -> &Manifest {
        self.source.manifest()
    }

    /// A file that cannot be written is no reason not to read.
    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.source.read(name, range.clone(), into)?;
        if self.failure.get().is_none()
            && let Err(failure) = self.write(name, &range, into)
        {
            let _ = self.failure.set(failure);
        }
        Ok(())
    }
}

fn cannot_write(path: &Path, error: &io::Error) -> FileError {
    FileError::new(path, format_args!("cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::fixture::{self, TINY};
    use crate::merge::{MergePlan, Recipe};

    fn merged(dir: &Path) -> Arc<Merged> {
        fixture::write(&dir.join("a"), &fixture::config(TINY), &fixture::llama(TINY, "F32", 1), 1).unwrap();
        let recipe = Recipe::from_yaml("members: [a]", dir).unwrap();
        Arc::new(Merged::new(Arc::new(MergePlan::open(&recipe).unwrap())).unwrap())
    }

    #[test]
    fn a_disk_that_fails_does_not_fail_the_reading() {
        let dir = tempfile::tempdir().unwrap();
        let merged = merged(dir.path());
        let mut recorder = Recorder::new(Staging::within(dir.path(), "x").unwrap(), &merged).unwrap();
        // Open for reading only, so that every write fails.
        recorder.file = File::open(&recorder.path).unwrap();
        let mut elements = Elements::default();
        for _ in 0..2 {
            recorder.read("score.weight", 0..8, &mut elements).unwrap();
            assert_eq!(elements.len(), 8);
        }
        let error = recorder.finish(WeightsId([0; 32]), Vec::new()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: cannot be written"), "{error}");
    }

    #[test]
    fn what_was_read_in_part_twice_or_not_at_all_is_written_whole() {
        let dir = tempfile::tempdir().unwrap();
        let merged = merged(dir.path());
        let recorder = Recorder::new(Staging::within(dir.path(), "x").unwrap(), &merged).unwrap();
        let mut elements = Elements::default();
        recorder.read("score.weight", 3..5, &mut elements).unwrap();
        for _ in 0..2 {
            recorder.read("model.norm.weight", 0..8, &mut elements).unwrap();
        }
        recorder.read("model.embed_tokens.weight", 0..192, &mut elements).unwrap();
        let staging = recorder.finish(WeightsId([0; 32]), Vec::new()).unwrap();
        let written = crate::checkpoint::Weights::open(staging.folder()).unwrap();
        for (name, info) in merged.manifest().iter() {
            let mut expected = Elements::default();
            merged.read(name, 0..info.elements(), &mut expected).unwrap();
            written.read(name, 0..info.elements(), &mut elements).unwrap();
            assert_eq!(elements, expected, "{name}");
        }
    }
}
