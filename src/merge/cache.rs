//! Merged weights kept on disk, so that the next start reads one model instead of all members.
//!
//! ```text
//! DIR/lock                       held for the moments in which entries appear or go
//! DIR/weights/WEIGHTS_ID/        model.safetensors, and entry.json with the checksum of its tensors
//! DIR/hashes/KEY                 the content hash of a source, by path, size, times and inode of its files
//! ```
//!
//! An entry is named by what the weights depend on, so it never becomes wrong, only useless. It appears by a rename, its
//! tensors are hashed as they are read and compared with the checksum before anything uses them, and what fails that test
//! is dropped. Any number of processes may share the folder; one that finds another merging the same leaves the keeping to
//! it. Nothing here ever makes a load fail: whatever goes wrong is an error value, and the caller merges as without cache.

mod keys;
mod recorder;

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::content::Remembered;
use super::staging::{FileError, Staging, sweep};
use super::{MergePlan, Merged, PlannedSource};
use crate::checkpoint::{Elements, Manifest, SourceError, TensorSource, Weights};
use crate::clock::Clock;
use crate::domain::WeightsId;
use keys::{Hashes, Keys};
pub use recorder::Recorder;

const MAX_ENTRY_BYTES: u64 = 1 << 20;
const ENTRY: &str = "entry.json";

/// A folder of merged weights, and how large it may become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    pub dir: PathBuf,
    pub max_bytes: u64,
}

/// An opened cache.
pub struct Cache {
    dir: PathBuf,
    max_bytes: u64,
    hashes: Hashes,
    clock: Clock,
}

/// The place that one plan has in a cache.
pub struct Slot<'c> {
    cache: &'c Cache,
    plan: Arc<MergePlan>,
    keys: Keys,
}

/// What is said about an entry.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    weights_id: String,
    /// BLAKE3 over names, dtypes, shapes and bytes of all tensors.
    checksum: String,
    /// What the merge had to say.
    notes: Vec<String>,
    warm_version: String,
}

impl Cache {
    /// Makes the folders if there are none.
    pub fn open(options: &CacheOptions, clock: Clock) -> Result<Self, FileError> {
        for folder in ["weights", "hashes"] {
            let folder = options.dir.join(folder);
            fs::create_dir_all(&folder).map_err(|error| FileError::new(&folder, format_args!("cannot be created: {error}")))?;
        }
        let hashes = Hashes::new(options.dir.join("hashes"));
        Ok(Self { dir: options.dir.clone(), max_bytes: options.max_bytes, hashes, clock })
    }

    /// The plan's place; `None` where a cache is of no use (one checkpoint is read as fast as an entry) or cannot know
    /// whether a source is still the same.
    pub fn slot(&self, plan: &Arc<MergePlan>) -> Option<Slot<'_>> {
        if checkpoints(plan) < 2 {
            return None;
        }
        let keys = Keys::of(plan, self.clock.wall())?;
        Some(Slot { cache: self, plan: Arc::clone(plan), keys })
    }

    fn weights(&self) -> PathBuf {
        self.dir.join("weights")
    }

    /// Runs what must not happen in two processes at once.
    fn locked<R>(&self, run: impl FnOnce() -> Result<R, FileError>) -> Result<R, FileError> {
        let path = self.dir.join("lock");
        let open = || File::options().create(true).truncate(false).write(true).open(&path);
        let lock = open().and_then(|file| file.lock().map(|()| file));
        let lock = lock.map_err(|error| FileError::new(&path, format_args!("cannot be locked: {error}")))?;
        let outcome = run();
        drop(lock);
        outcome
    }

    /// Notes that an entry was used. Where that cannot be written, nothing is evicted either.
    fn touch(&self, entry: &Path) {
        let noted = File::options().append(true).open(entry.join(ENTRY)).and_then(|file| file.set_modified(self.clock.wall()));
        if let Err(error) = noted {
            tracing::debug!(entry = %entry.display(), %error, "the use of merged weights cannot be noted");
        }
    }

    /// Removes the entries that were used the longest time ago until the rest fits, but for the one that was just made.
    fn evict(&self, newest: &Path) {
        let mut entries: Vec<_> = listed(&self.weights())
            .into_iter()
            .filter(|entry| entry.is_dir() && *entry != newest)
            .map(|entry| (modified(&entry.join(ENTRY)), bytes_of(&entry), entry))
            .collect();
        entries.sort();
        let mut total = bytes_of(newest) + entries.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        for (_, bytes, entry) in entries {
            if total <= self.max_bytes {
                break;
            }
            tracing::info!(entry = %entry.display(), bytes, "merged weights go from the cache, to make room");
            remove(&entry);
            total -= bytes;
        }
        self.hashes.trim();
    }
}

impl<'c> Slot<'c> {
    /// The name of the merged weights and the content hash of every member, if the content of every source is remembered.
    /// Reads none of them.
    pub fn remembered(&self) -> Option<(WeightsId, Vec<[u8; 32]>)> {
        let hashes: Vec<[u8; 32]> = self.keys.sources.iter().map(|key| self.cache.hashes.get(key)).collect::<Option<_>>()?;
        let (members, init) = hashes.split_at_checked(self.plan.members().len())?;
        Some((self.plan.weights_id(members, init.first().copied()), members.to_vec()))
    }

    /// The merged weights, if they were kept. An entry that is visibly broken is dropped.
    pub fn find(&self) -> Option<Cached<'c>> {
        let (weights_id, members) = self.remembered()?;
        let place = self.cache.weights().join(weights_id.to_string());
        if !place.exists() {
            return None;
        }
        let cache = self.cache;
        match open_entry(&place, weights_id, self.plan.manifest()) {
            Ok((source, entry)) => {
                cache.touch(&place);
                Some(Cached { cache, place, weights_id, members, source, entry })
            }
            Err(problem) => {
                discard(cache, &place, &problem);
                None
            }
        }
    }

    /// A source that gives what `merged` gives and keeps it, to be handed to [`Slot::keep`] when the model is loaded.
    /// `None` where another process is keeping the same.
    pub fn record(&self, merged: &Arc<Merged>) -> Result<Option<Recorder>, FileError> {
        let bytes = self.plan.merged_bytes();
        let (parent, max) = (self.cache.weights(), self.cache.max_bytes);
        if bytes > max {
            let problem = format!("the merged weights have {bytes} bytes, which the cache's limit of {max} bytes does not allow");
            return Err(FileError::new(&parent, problem));
        }
        let mut hasher = blake3::Hasher::new();
        self.keys.sources.iter().for_each(|key| _ = hasher.update(key));
        let name = hasher.update(self.plan.recipe().to_resolved_string().as_bytes()).finalize().to_hex();
        self.cache.locked(|| {
            sweep(&parent, "");
            if sweep(&parent, &format!("{name}.")) { Ok(None) } else { Recorder::new(Staging::within(&parent, &name)?, merged).map(Some) }
        })
    }

    /// Makes what was recorded an entry, and remembers the content of every source, if it was the same all the time.
    pub fn keep(&self, recorder: Recorder, merged: &Merged) -> Result<(), FileError> {
        let cannot = |error: SourceError| FileError::new(&self.cache.dir, error);
        let weights_id = merged.weights_id().map_err(cannot)?;
        let place = self.cache.weights().join(weights_id.to_string());
        let staging = recorder.finish(weights_id, merged.notes())?;
        self.cache.locked(|| {
            if !place.exists() {
                staging.publish(&place, false)?;
            }
            self.cache.touch(&place);
            self.cache.evict(&place);
            Ok(())
        })?;
        let now = Keys::of(&self.plan, self.cache.clock.wall());
        if self.keys.settled && now.as_ref() == Some(&self.keys) {
            let hashes = merged.member_hashes().map_err(cannot)?.into_iter().chain(merged.init_hash().map_err(cannot)?);
            for (key, hash) in self.keys.sources.iter().zip(hashes) {
                let cannot = |error| FileError::new(&self.cache.dir, format_args!("a content hash cannot be remembered: {error}"));
                self.cache.hashes.put(key, &hash).map_err(cannot)?;
            }
        }
        Ok(())
    }
}

/// Merged weights as they were kept.
pub struct Cached<'c> {
    cache: &'c Cache,
    place: PathBuf,
    weights_id: WeightsId,
    members: Vec<[u8; 32]>,
    source: Remembered,
    entry: Entry,
}

impl Cached<'_> {
    pub fn weights_id(&self) -> WeightsId {
        self.weights_id
    }

    /// The content hash of every member.
    pub fn member_hashes(&self) -> &[[u8; 32]] {
        &self.members
    }

    pub fn notes(&self) -> &[String] {
        &self.entry.notes
    }

    /// Whether all that was read is what was written, bit for bit. What was not read yet is read now.
    pub fn verify(&self) -> Result<(), String> {
        let found = checksum(&self.source).map_err(|error| error.to_string())?;
        if found == self.entry.checksum { Ok(()) } else { Err(format!("checksum: expected {}, found {found}", self.entry.checksum)) }
    }

    /// Removes the entry, which is not what it should be.
    pub fn discard(self, problem: &str) {
        discard(self.cache, &self.place, problem);
    }
}

impl TensorSource for Cached<'_> {
    fn manifest(&self) -> &Manifest {
        self.source.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.source.read(name, range, into)
    }
}

/// How many checkpoints a plan reads, those of recipes within it counted; an adapter and its base are two.
fn checkpoints(plan: &MergePlan) -> usize {
    let count = |source: &PlannedSource| match source.plan() {
        Some(plan) => checkpoints(plan),
        None if source.reads().is_empty() => 0,
        None => 1 + usize::from(source.weights.adapter().is_some()),
    };
    plan.sources().map(count).sum()
}

/// BLAKE3 over names, dtypes, shapes and bytes of all tensors of a source.
fn checksum(source: &Remembered) -> Result<String, SourceError> {
    Ok(blake3::Hash::from(source.content_hash(source.manifest().names())?).to_hex().to_string())
}

fn open_entry(place: &Path, weights_id: WeightsId, manifest: &Manifest) -> Result<(Remembered, Entry), String> {
    let text = read_capped(&place.join(ENTRY), MAX_ENTRY_BYTES).map_err(|error| format!("{ENTRY} cannot be read: {error}"))?;
    let entry: Entry = serde_json::from_slice(&text).map_err(|error| format!("{ENTRY} is not what was written: {error}"))?;
    if entry.weights_id != weights_id.to_string() {
        return Err(format!("{ENTRY} names other weights: {}", entry.weights_id));
    }
    let weights = Weights::open(place).map_err(|error| error.to_string())?;
    if weights.manifest() != manifest {
        return Err("its tensors are not those of the plan".to_owned());
    }
    Ok((Remembered::new(Arc::new(weights), place.display().to_string()), entry))
}

fn discard(cache: &Cache, place: &Path, problem: &str) {
    tracing::warn!(entry = %place.display(), problem, "kept merged weights are broken; they are dropped and merged again");
    let dropped = cache.locked(|| {
        remove(place);
        Ok(())
    });
    if let Err(error) = dropped {
        tracing::warn!(%error, "broken merged weights cannot be dropped");
    }
}

/// Removes an entry: first from sight, so that nobody opens a half of it.
fn remove(entry: &Path) {
    let hidden = entry.with_file_name(format!(".gone.{}.partial", entry.file_name().unwrap_or_default().to_string_lossy()));
    let gone = match fs::rename(entry, &hidden) {
        Ok(()) => fs::remove_dir_all(&hidden),
        Err(error) => Err(error),
    };
    if let Err(error) = gone {
        tracing::warn!(entry = %entry.display(), %error, "merged weights cannot be removed from the cache");
    }
}

fn listed(folder: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    names.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')).map(|entry| entry.path()).collect()
}

fn modified(path: &Path) -> Option<std::time::SystemTime> {
    fs::metadata(path).and_then(|found| found.modified()).ok()
}

fn bytes_of(folder: &Path) -> u64 {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).sum()
}

fn read_capped(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit { Err(io::Error::other(format!("has more than {limit} bytes"))) } else { Ok(content) }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
