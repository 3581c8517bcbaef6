//! Where a merge reads: the weights of members and init, with the memory of what was read of them.
//!
//! What is hashed is what is stored: of an adapter, the tensors of its base and of its file with the numbers they are joined
//! by, not the sums. And what several members stand on is read once: blocks of a shared base are kept for as long as it
//! takes one thread to go through the members.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::content::{BLOCK_ELEMENTS, Remembered, hash_text};
use crate::checkpoint::{
    Adapter, Dtype, Elements, FileStamp, Manifest, Orientation, Origin, Part, SourceError, Summand, TensorInfo, TensorSource,
};
use crate::lock::lock;

/// The weights of one member or of init.
pub struct Tracked {
    made: Made,
    /// The place of the source, for errors.
    place: String,
}

enum Made {
    /// A checkpoint's own, or those of another merge.
    Stored(Arc<Shared>),
    Adapted {
        /// Reads through the other two.
        adapter: Adapter,
        base: Arc<Shared>,
        stored: Arc<Remembered>,
    },
}

impl Tracked {
    pub fn place(&self) -> &str {
        &self.place
    }

    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        match &self.made {
            Made::Stored(shared) => shared.remembered.get(name),
            Made::Adapted { adapter, .. } => adapter.manifest().get(name),
        }
    }

    pub fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        match &self.made {
            Made::Stored(shared) => shared.read(name, range, into),
            Made::Adapted { adapter, .. } => adapter.read(name, range, into),
        }
    }

    /// Reads a tensor as it is before an adapter adds to it.
    pub fn read_bare(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        match &self.made {
            Made::Stored(shared) => shared.read(name, range, into),
            Made::Adapted { adapter, .. } => adapter.read_bare(name, range, into),
        }
    }

    /// Whether both read one stored checkpoint: as their own, or as the base that they stand on.
    pub fn shares_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.shared(), other.shared())
    }

    fn shared(&self) -> &Arc<Shared> {
        match &self.made {
            Made::Stored(shared) => shared,
            Made::Adapted { base, .. } => base,
        }
    }

    /// Reads what will be read again, and hashed then. What an adapter computes is hashed at once.
    pub fn glance(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        match &self.made {
            Made::Stored(shared) => shared.get(name, range, into, Remembered::glance),
            Made::Adapted { adapter, .. } => adapter.read(name, range, into),
        }
    }

    /// The adapter that this is, if it is one on a base.
    pub fn adapter(&self) -> Option<&Adapter> {
        match &self.made {
            Made::Stored(_) => None,
            Made::Adapted { adapter, .. } => Some(adapter),
        }
    }

    /// Bytes of buffers beside those of the merge itself, at most, with so many threads.
    pub fn buffer_bytes(&self, threads: usize) -> u64 {
        let (shared, adapter) = match &self.made {
            Made::Stored(shared) => (shared, None),
            Made::Adapted { adapter, base, .. } => (base, Some(adapter)),
        };
        let widest = shared.manifest().iter().map(|(_, info)| info.dtype.size()).max().unwrap_or_default();
        let block = (BLOCK_ELEMENTS * widest) as u64;
        let readers = shared.readers.load(Ordering::Relaxed) as u64;
        let kept = if readers > 1 { block * kept_blocks(threads) as u64 / readers } else { 0 };
        kept + adapter.map_or(0, |adapter| adapter.factor_bytes() + block * threads as u64)
    }

    /// As the source says it.
    pub fn files(&self) -> Option<Vec<FileStamp>> {
        match &self.made {
            Made::Stored(shared) => shared.files(),
            Made::Adapted { adapter, .. } => adapter.files(),
        }
    }

    /// How some tensors are made from what lies in the files: as long as both are the same, so are the tensors.
    pub fn making(&self, names: &[String]) -> Vec<String> {
        let parts = |adapter: &Adapter| names.iter().filter_map(|name| adapter.part(name)).map(|part| format!("{part:?}")).collect();
        self.adapter().map(parts).unwrap_or_default()
    }

    /// BLAKE3 over some of the tensors that are followed, which are given in name order: name, dtype, shape and BLAKE3 of the
    /// bytes of each, however the tensors are spread over files. Of an adapter's tensors it is what they are made from.
    pub fn content_hash<'n>(&self, names: impl IntoIterator<Item = &'n String>) -> Result<[u8; 32], SourceError> {
        let (adapter, base, stored) = match &self.made {
            Made::Stored(shared) => return shared.remembered.content_hash(names.into_iter().map(String::as_str)),
            Made::Adapted { adapter, base, stored } => (adapter, base, stored),
        };
        let mut hasher = blake3::Hasher::new_derive_key("warm adapter content 1");
        for (name, part) in names.into_iter().filter_map(|name| Some((name, adapter.part(name)?))) {
            hash_text(&mut hasher, name);
            hash_part(part, &base.remembered, stored, &mut hasher)?;
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

fn hash_part(part: &Part, base: &Remembered, stored: &Remembered, hasher: &mut blake3::Hasher) -> Result<(), SourceError> {
    match &part.origin {
        Origin::Base(name) => base.hash_tensor(name, hasher)?,
        Origin::Adapter(name) => stored.hash_tensor(name, hasher)?,
    }
    let Some(term) = &part.term else {
        hash_text(hasher, "as it is");
        return Ok(());
    };
    let (how, tensors) = match &term.summand {
        Summand::Product { a, b, orientation: Orientation::Rows, .. } => ("plus B A", vec![b, a]),
        Summand::Product { a, b, orientation: Orientation::Columns, .. } => ("plus B A, transposed", vec![b, a]),
        Summand::Vector(bias) => ("plus a vector", vec![bias]),
    };
    hash_text(hasher, how);
    hasher.update(&term.scale.to_bits().to_le_bytes());
    tensors.into_iter().try_for_each(|name| stored.hash_tensor(name, hasher))
}

/// What is stored of a tensor, where it may be computed.
pub fn stored<'s>(source: &'s dyn TensorSource, name: &str) -> impl Iterator<Item = &'s TensorInfo> {
    inputs(source, name).into_iter().map(|(_, info)| info)
}

/// What a tensor is read from: its name in a checkpoint that others may read, too, or none in an adapter's file.
fn inputs<'s>(source: &'s dyn TensorSource, name: &str) -> Vec<(Option<&'s str>, &'s TensorInfo)> {
    let Some(adapter) = source.adapter() else {
        return source.manifest().get_key_value(name).map(|(name, info)| (Some(name), info)).into_iter().collect();
    };
    let Some(part) = adapter.part(name) else { return Vec::new() };
    let (base, stored) = (adapter.base().manifest(), adapter.stored().manifest());
    let origin = match &part.origin {
        Origin::Base(name) => base.get(name).map(|info| (Some(name.as_str()), info)),
        Origin::Adapter(name) => stored.get(name).map(|info| (None, info)),
    };
    let summands = match part.term.as_ref().map(|term| &term.summand) {
        None => Vec::new(),
        Some(Summand::Product { a, b, .. }) => vec![a, b],
        Some(Summand::Vector(bias)) => vec![bias],
    };
    origin.into_iter().chain(summands.into_iter().filter_map(|name| Some((None, stored.get(name)?)))).collect()
}

/// The stored checkpoints that the sources of one plan read, each once.
#[derive(Default)]
pub struct Places {
    /// By their folders.
    shared: BTreeMap<PathBuf, Arc<Shared>>,
    /// Tensors of shared checkpoints, those by their addresses, whose bytes have been counted.
    counted: BTreeSet<(usize, String)>,
}

impl Places {
    /// Follows a source, whose place is `path`.
    pub fn track(&mut self, source: &Arc<dyn TensorSource>, path: &Path) -> Tracked {
        let place = path.display().to_string();
        let Some(adapter) = source.adapter() else {
            let folder = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            return Tracked { made: Made::Stored(self.share(source, folder)), place };
        };
        let base = self.share(adapter.base(), adapter.place().base.clone());
        // Factors are read under a lock.
        let stored = Remembered::new(Arc::clone(adapter.stored()), place.clone()).on_this_thread();
        let stored = Arc::new(stored);
        let adapter = adapter.through(Arc::clone(&base) as Arc<dyn TensorSource>, Arc::clone(&stored) as Arc<dyn TensorSource>);
        Tracked { made: Made::Adapted { adapter, base, stored }, place }
    }

    /// What has been opened in this folder already, if it is the same still.
    fn share(&mut self, source: &Arc<dyn TensorSource>, folder: PathBuf) -> Arc<Shared> {
        if let Some(known) = self.shared.get(&folder).filter(|known| is_same(&***known, &**source)) {
            known.readers.fetch_add(1, Ordering::Relaxed);
            return Arc::clone(known);
        }
        let remembered = Remembered::new(Arc::clone(source), folder.display().to_string());
        let shared = Arc::new(Shared { remembered, readers: AtomicUsize::new(1), recent: Mutex::default() });
        self.shared.insert(folder, Arc::clone(&shared));
        shared
    }

    /// Dtypes of what is stored of some tensors of a source, and the bytes of it that were not counted for another source that reads
    /// the same ones.
    pub fn count(&mut self, source: &Tracked, names: &[String]) -> (BTreeSet<Dtype>, u64) {
        let (shared, source): (_, &dyn TensorSource) = match &source.made {
            Made::Stored(shared) => (shared, &**shared),
            Made::Adapted { adapter, base, .. } => (base, adapter),
        };
        let place = Arc::as_ptr(shared).addr();
        let (mut dtypes, mut bytes) = (BTreeSet::new(), 0);
        for name in names {
            for (shared, info) in inputs(source, name) {
                dtypes.insert(info.dtype);
                if shared.is_none_or(|shared| self.counted.insert((place, shared.to_owned()))) {
                    bytes += info.bytes();
                }
            }
        }
        (dtypes, bytes)
    }
}

/// A stored checkpoint that one or several sources read.
struct Shared {
    remembered: Remembered,
    /// How many sources do.
    readers: AtomicUsize,
    /// Blocks that were read last, for the sources that come after.
    recent: Mutex<Recent>,
}

/// The oldest first.
#[derive(Default)]
struct Recent {
    blocks: Vec<Block>,
}

struct Block {
    name: String,
    range: Range<usize>,
    elements: Arc<Elements>,
}

impl Shared {
    fn recent(&self) -> MutexGuard<'_, Recent> {
        lock(&self.recent)
    }

    /// Takes a block that another source has read a moment ago, or reads it.
    fn get(
        &self,
        name: &str,
        range: Range<usize>,
        into: &mut Elements,
        read: fn(&Remembered, &str, Range<usize>, &mut Elements) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        if self.readers.load(Ordering::Relaxed) == 1 {
            return read(&self.remembered, name, range, into);
        }
        let known = self.recent().find(name, &range);
        if let Some(known) = known {
            into.copy_from(&known);
            return Ok(());
        }
        read(&self.remembered, name, range.clone(), into)?;
        let spare = self.recent().oldest();
        let mut elements = spare.and_then(Arc::into_inner).unwrap_or_default();
        elements.copy_from(into);
        self.recent().blocks.push(Block { name: name.to_owned(), range, elements: Arc::new(elements) });
        Ok(())
    }
}

impl TensorSource for Shared {
    fn manifest(&self) -> &Manifest {
        self.remembered.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.get(name, range, into, Remembered::read)
    }

    fn files(&self) -> Option<Vec<FileStamp>> {
        self.remembered.files()
    }
}

/// Whether two sources that were opened in one folder, perhaps on different ways to it, read the same files.
fn is_same(a: &dyn TensorSource, b: &dyn TensorSource) -> bool {
    let named = |file: FileStamp| FileStamp { path: file.path.file_name().unwrap_or_default().into(), ..file };
    let files = |source: &dyn TensorSource| source.files().map(|files| files.into_iter().map(named).collect::<Vec<_>>());
    files(a).is_some_and(|found| files(b) == Some(found)) && a.manifest() == b.manifest()
}

/// Each thread goes through the sources block by block, so twice as many blocks as threads are enough.
fn kept_blocks(threads: usize) -> usize {
    2 * threads
}

impl Recent {
    fn find(&self, name: &str, range: &Range<usize>) -> Option<Arc<Elements>> {
        self.blocks.iter().find(|block| block.range == *range && block.name == name).map(|block| Arc::clone(&block.elements))
    }

    /// Makes room.
    fn oldest(&mut self) -> Option<Arc<Elements>> {
        let room = kept_blocks(rayon::current_num_threads());
        (self.blocks.len() >= room).then(|| self.blocks.remove(0).elements)
    }
}

#[cfg(test)]
#[path = "tracked_tests.rs"]
mod tests;
