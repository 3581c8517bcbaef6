//! Content hashes without reading: remembered by path, size, times and inode of the files that they were taken from.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{listed, modified, read_capped};
use crate::merge::content::hash_text;
use crate::merge::{MergePlan, PlannedSource};

/// A file that was changed so recently may change again without its times telling: clocks of file systems tick slowly.
const SETTLED: Duration = Duration::from_secs(2);
/// Content hashes that are remembered; the oldest go.
const MAX_HASHES: usize = 4096;

/// What stands for the content of every source, without reading it: members in order, then init if it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pub sources: Vec<[u8; 32]>,
    /// Whether all files have been left alone for long enough.
    pub settled: bool,
}

impl Keys {
    /// `None` where a source cannot say whether it is still the same.
    pub fn of(plan: &MergePlan, now: SystemTime) -> Option<Self> {
        let mut settled = true;
        let sources = plan.sources().filter(|source| !source.reads().is_empty() || is_member(plan, source));
        let sources = sources.map(|source| key(source, now, &mut settled)).collect::<Option<_>>()?;
        Some(Self { sources, settled })
    }
}

fn key(source: &PlannedSource, now: SystemTime, settled: &mut bool) -> Option<[u8; 32]> {
    let mut hasher = blake3::Hasher::new_derive_key("warm source key 1");
    let count = |hasher: &mut blake3::Hasher, count: u64| _ = hasher.update(&count.to_le_bytes());
    count(&mut hasher, source.reads().len() as u64);
    source.reads().iter().for_each(|name| hash_text(&mut hasher, name));
    if let Some(plan) = source.plan() {
        hash_text(&mut hasher, &plan.recipe().to_resolved_string());
        for source in plan.sources() {
            hasher.update(&key(source, now, settled)?);
        }
        return Some(*hasher.finalize().as_bytes());
    }
    source.weights.making(source.reads()).iter().for_each(|part| hash_text(&mut hasher, part));
    let files = source.weights.files()?;
    count(&mut hasher, files.len() as u64);
    for file in files {
        hash_text(&mut hasher, &file.path.to_string_lossy());
        let since = file.modified.duration_since(UNIX_EPOCH).ok()?;
        for number in [file.bytes, since.as_secs(), u64::from(since.subsec_nanos()), file.inode] {
            count(&mut hasher, number);
        }
        count(&mut hasher, file.changed.0 as u64);
        count(&mut hasher, file.changed.1 as u64);
        // Before 1970 there were no such files; what claims to be one is never settled.
        let changed = UNIX_EPOCH + Duration::from_secs(file.changed.0.max(0) as u64);
        *settled &= [file.modified, changed].iter().all(|&time| now.duration_since(time).is_ok_and(|age| age >= SETTLED));
    }
    Some(*hasher.finalize().as_bytes())
}

/// A folder of content hashes by key.
pub struct Hashes(PathBuf);

impl Hashes {
    pub fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// A content hash that was remembered, guarded by a hash of its own.
    pub fn get(&self, key: &[u8; 32]) -> Option<[u8; 32]> {
        let bytes = read_capped(&self.path(key), 64).ok()?;
        let (hash, check) = bytes.split_at_checked(32)?;
        if check == check_of(key, hash) { hash.try_into().ok() } else { None }
    }

    pub fn put(&self, key: &[u8; 32], hash: &[u8; 32]) -> io::Result<()> {
        let path = self.path(key);
        let unfinished = path.with_extension(std::process::id().to_string());
        fs::write(&unfinished, [hash.as_slice(), &check_of(key, hash)].concat())?;
        fs::rename(unfinished, path)
    }

    /// Forgets the oldest, if there are too many.
    pub fn trim(&self) {
        let mut hashes: Vec<_> = listed(&self.0).into_iter().map(|path| (modified(&path), path)).collect();
        hashes.sort();
        let excess = hashes.len().saturating_sub(MAX_HASHES);
        hashes.iter().take(excess).for_each(|(_, path)| _ = fs::remove_file(path));
    }

    fn path(&self, key: &[u8; 32]) -> PathBuf {
        self.0.join(blake3::Hash::from(*key).to_hex().as_str())
    }
}

fn check_of(key: &[u8; 32], hash: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new_derive_key("warm remembered hash 1").update(key).update(hash).finalize().as_bytes()
}

fn is_member(plan: &MergePlan, source: &PlannedSource) -> bool {
    plan.members().iter().any(|member| std::ptr::eq(member.source(), source))
}
