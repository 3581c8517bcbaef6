//! The prefix cache of one model: keys and values that outlive their pack.
//!
//! Scores are bit-identical with and without it. Keys and values of a token depend on the tokens before it alone, by the
//! rule that rows depend on no company; attention meets the same blocks of keys in the same order, wherever they come from.
//! Only finite numbers are kept: in a block with any other, masked keys would be more than nothing to those before them.

use std::cell::RefCell;
use std::iter::Sum;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use super::device::Backend;
use super::kernels::keys::{Block, Blocks, Form, Kept, Past};
use super::ops::Ops;
use super::pack::{Pack, PrefixKey};
use super::prefix_cache::{BLOCK, Plan, PrefixCache, Wanted};
use crate::checkpoint::Architecture;
use crate::lock::lock;

/// Empty, and keeps nothing, until it is given bytes.
#[derive(Debug)]
pub struct Prefixes {
    block_bytes: usize,
    cache: Mutex<PrefixCache<Kept>>,
    /// Blocks that are held, and the most: known without the lock, which a forward has for its whole length.
    held: AtomicUsize,
    capacity: AtomicUsize,
}

/// Keys and values that are kept for packs to come, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixBytes {
    pub held: u64,
    /// The most that may be held.
    pub bound: u64,
}

impl Sum for PrefixBytes {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self { held: sum.held + one.held, bound: sum.bound + one.bound })
    }
}

/// The cache while one pack is computed.
pub type Open<'a> = MutexGuard<'a, PrefixCache<Kept>>;

/// What one pack takes from earlier ones, and what it leaves for later ones.
pub struct Memory {
    past: Vec<Vec<Arc<Kept>>>,
    wanted: Vec<Wanted>,
    /// For every wanted block what the layers so far have left.
    kept: RefCell<Vec<Vec<Block>>>,
}

impl Prefixes {
    /// `None` where operations of candle compute, which take no keys of earlier packs.
    pub fn of(backend: &Backend, architecture: &Architecture) -> Option<Self> {
        if backend.ops == Ops::Kernels { Self::new(architecture) } else { None }
    }

    /// `None` for models whose tokens depend on more than what comes before them.
    pub fn new(architecture: &Architecture) -> Option<Self> {
        let a = architecture;
        let alone = a.causal && a.disentangled.is_none() && a.positions.as_ref().is_none_or(|positions| positions.skips.is_none());
        let numbers = a.layers.len() * Form::new(a.heads, a.kv_heads, a.head_dim).size();
        // The tokens stand twice in the cache, and a block is an entry of a few tables.
        let block_bytes = numbers * size_of::<f32>() + 2 * BLOCK * size_of::<u32>() + 512;
        let (cache, held, capacity) = (Mutex::new(PrefixCache::new(0)), AtomicUsize::new(0), AtomicUsize::new(0));
        alone.then_some(Self { block_bytes, cache, held, capacity })
    }

    /// Forgets everything, and keeps so many bytes from now on.
    pub fn resize(&self, bytes: usize) {
        let capacity = bytes / self.block_bytes;
        let mut cache = lock(&self.cache);
        let before = std::mem::replace(&mut *cache, PrefixCache::new(capacity));
        self.cache.clear_poison();
        self.capacity.store(capacity, Ordering::Relaxed);
        self.held.store(0, Ordering::Relaxed);
        // Freed without the lock: there may be much of it.
        drop(cache);
        drop(before);
    }

    /// What is held and may be, in whole blocks.
    pub fn bytes(&self) -> PrefixBytes {
        let bytes = |blocks: &AtomicUsize| (blocks.load(Ordering::Relaxed) * self.block_bytes) as u64;
        PrefixBytes { held: bytes(&self.held), bound: bytes(&self.capacity) }
    }

    /// Counts what a pack has left.
    pub fn count(&self, cache: &Open<'_>) {
        self.held.store(cache.len(), Ordering::Relaxed);
    }

    /// The cache for one pack. A pack that is computed beside another goes without; it scores the same.
    pub fn open(&self) -> Option<Open<'_>> {
        let open = match self.cache.try_lock() {
            Ok(open) => open,
            Err(TryLockError::WouldBlock) => return None,
            Err(TryLockError::Poisoned(poisoned)) => {
                // A pack that panicked may have left places unfilled.
                let mut open = poisoned.into_inner();
                *open = PrefixCache::new(open.capacity());
                self.cache.clear_poison();
                open
            }
        };
        (open.capacity() > 0).then_some(open)
    }
}

impl Memory {
    /// Plans a pack, and gives what is left of it to compute; see [`PrefixCache::plan`].
    pub fn plan(
        cache: &mut PrefixCache<Kept>,
        pack: &Pack,
        key: impl Fn(usize) -> Option<PrefixKey>,
        first_read: impl Fn(usize) -> usize,
    ) -> (Self, Pack) {
        let Plan { there, past, wanted } = cache.plan(pack, key, first_read);
        let kept = RefCell::new(vec![Vec::new(); wanted.len()]);
        (Self { past, wanted, kept }, pack.without(&there))
    }

    pub fn past(&self, layer: usize) -> Past<'_> {
        Past { blocks: &self.past, layer }
    }

    /// Takes what is wanted of one layer.
    pub fn keep(&self, blocks: &mut Blocks) {
        for (wanted, kept) in self.wanted.iter().zip(self.kept.borrow_mut().iter_mut()) {
            kept.push(blocks.take(wanted.node, wanted.block));
        }
    }

    /// Leaves what was kept in the cache, or, where the pack failed, the places that were made for it.
    pub fn leave(self, cache: &mut PrefixCache<Kept>, computed: bool) {
        for (wanted, layers) in self.wanted.into_iter().zip(self.kept.into_inner()) {
            let finite = |block: &Block| block.iter().fold(0.0, |sum, value| sum + value * 0.0) == 0.0;
            cache.fill(wanted, (computed && layers.iter().all(finite)).then_some(Kept { layers }));
        }
    }
}
