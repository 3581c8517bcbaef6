//! The content hash of a checkpoint, taken from the reads that its merge does anyway.
//!
//! BLAKE3 is a tree over its input, so blocks of a tensor can be hashed in any order, by any thread, and joined later; the
//! hash of a tensor is the plain BLAKE3 of its stored little-endian bytes. A block that is read again must have the same
//! bytes as before, so what the hash names is what was merged, even if somebody writes into the file meanwhile.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use blake3::hazmat::{HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use rayon::prelude::*;

use crate::checkpoint::{Elements, FileStamp, Manifest, SourceError, TensorInfo, TensorSource};

/// Elements that are read, averaged and hashed together: a power of two, so that a block of any dtype is a subtree of
/// BLAKE3 (at least 1 KiB), and small enough that sums, input and output of a block stay in a core's cache.
pub const BLOCK_ELEMENTS: usize = 64 << 10;

/// A source that remembers what it has read.
pub struct Remembered {
    source: Arc<dyn TensorSource>,
    /// The place of the source, for errors.
    place: String,
    blocks: BTreeMap<String, Vec<Slot>>,
    /// Blocks of one read are hashed in parallel.
    in_pool: bool,
}

/// What is remembered of a block.
#[derive(Debug, Default)]
struct Slot {
    hash: OnceLock<[u8; 32]>,
    /// Of a block that was only glanced at.
    checksum: OnceLock<u64>,
}

impl Remembered {
    /// Follows all tensors of the source.
    pub fn new(source: Arc<dyn TensorSource>, place: String) -> Self {
        let slots = |info: &TensorInfo| (0..info.elements().div_ceil(BLOCK_ELEMENTS).max(1)).map(|_| Slot::default()).collect();
        let blocks = source.manifest().iter().map(|(name, info)| (name.to_owned(), slots(info))).collect();
        Self { source, place, blocks, in_pool: true }
    }

    /// The same for whoever holds a lock while reading: all is hashed by the thread that reads. One that waits for others of a
    /// pool may be handed work meanwhile that needs that lock.
    pub fn on_this_thread(self) -> Self {
        Self { in_pool: false, ..self }
    }

    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.source.manifest().get(name)
    }

    /// Reads what will be read again, and hashed then. Until then a checksum tells whether it is still the same: it costs a
    /// tenth of a hash, and whoever changes a file on purpose could as well have done it before.
    pub fn glance(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.follow(name, range, into, |slot, bytes, _, _| {
            let found = checksum(bytes);
            *slot.checksum.get_or_init(|| found) == found
        })
    }

    /// Reads, and asks of every block that lies wholly within the range whether it is as it was before.
    fn follow(
        &self,
        name: &str,
        range: Range<usize>,
        into: &mut Elements,
        as_before: impl Fn(&Slot, &[u8], &TensorInfo, (usize, usize)) -> bool + Sync,
    ) -> Result<(), SourceError> {
        self.source.read(name, range.clone(), into)?;
        let (Some(info), Some(slots)) = (self.get(name), self.blocks.get(name)) else { return Ok(()) };
        let first = range.start.div_ceil(BLOCK_ELEMENTS);
        let within = |block: &usize| block_range(info, *block).end <= range.end;
        let blocks = first..(first..slots.len()).take_while(within).last().map_or(first, |last| last + 1);
        let changed = |bytes: &[u8], block: usize| {
            let (elements, size) = (block_range(info, block), info.dtype.size());
            let place = (elements.start - range.start) * size..(elements.end - range.start) * size;
            let same = as_before(slots.get(block)?, bytes.get(place).unwrap_or_default(), info, (block, slots.len()));
            (!same).then_some(elements)
        };
        let changed = into.with_little_endian(|bytes| match blocks.len() {
            // Whoever reads block by block does so in parallel already.
            2.. if self.in_pool => blocks.into_par_iter().find_map_first(|block| changed(bytes, block)),
            _ => blocks.clone().find_map(|block| changed(bytes, block)),
        });
        let Some(elements) = changed else { return Ok(()) };
        let problem = format!("elements {elements:?} have changed since they were first read; the file was changed while in use");
        Err(SourceError::Read { file: self.place.clone(), tensor: name.to_owned(), problem })
    }

    /// BLAKE3 over name, dtype, shape and BLAKE3 of the bytes of some of the tensors that are followed, which are given in
    /// name order: the same however the tensors are spread over files. What has not been read yet is read now.
    pub fn content_hash<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Result<[u8; 32], SourceError> {
        let mut hasher = blake3::Hasher::new_derive_key("warm checkpoint content 1");
        for name in names.into_iter().filter(|name| self.blocks.contains_key(*name)) {
            hash_text(&mut hasher, name);
            self.hash_tensor(name, &mut hasher)?;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Adds dtype, shape and BLAKE3 of the bytes of a tensor that is followed.
    pub fn hash_tensor(&self, name: &str, hasher: &mut blake3::Hasher) -> Result<(), SourceError> {
        let (Some(info), Some(slots)) = (self.get(name), self.blocks.get(name)) else { return Ok(()) };
        let complete = |block: usize, slot: &Slot, buffer: &mut Elements| {
            if slot.hash.get().is_none() {
                self.read(name, block_range(info, block), buffer)?;
            }
            Ok(slot.hash.get().copied().unwrap_or_default())
        };
        let blocks = slots.par_iter().enumerate();
        let hashes: Vec<Result<[u8; 32], SourceError>> =
            blocks.map_init(Elements::default, |buffer, (block, slot)| complete(block, slot, buffer)).collect();
        // Of several errors the first block's is told, whichever thread was first.
        let hashes = hashes.into_iter().collect::<Result<Vec<_>, _>>()?;
        hash_text(hasher, info.dtype.safetensors_name());
        hasher.update(&(info.shape.len() as u64).to_le_bytes());
        for &dimension in &info.shape {
            hasher.update(&(dimension as u64).to_le_bytes());
        }
        hasher.update(&join(&hashes, info.bytes(), true));
        Ok(())
    }
}

impl TensorSource for Remembered {
    fn manifest(&self) -> &Manifest {
        self.source.manifest()
    }

    /// Reads like the source itself; blocks that lie wholly within the range are hashed too.
    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.follow(name, range, into, |slot, bytes, info, (block, blocks)| {
            let hash = hash_block(bytes, block, info, blocks);
            let as_glanced = slot.checksum.get().is_none_or(|&before| before == checksum(bytes));
            as_glanced && *slot.hash.get_or_init(|| hash) == hash
        })
    }

    fn files(&self) -> Option<Vec<FileStamp>> {
        self.source.files()
    }
}

/// The elements of a tensor's block.
pub fn block_range(info: &TensorInfo, block: usize) -> Range<usize> {
    let begin = block * BLOCK_ELEMENTS;
    begin..info.elements().min(begin.saturating_add(BLOCK_ELEMENTS))
}

/// Adds text with its length, so that no two lists of texts give the same bytes.
pub fn hash_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
}

fn hash_block(bytes: &[u8], block: usize, info: &TensorInfo, blocks: usize) -> [u8; 32] {
    if blocks == 1 {
        return *blake3::hash(bytes).as_bytes();
    }
    let offset = block as u64 * (BLOCK_ELEMENTS * info.dtype.size()) as u64;
    blake3::Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
}

/// Sums that run beside each other in a checksum.
const LANES: usize = 16;

/// Tells accidental changes apart, at the speed of memory.
fn checksum(bytes: &[u8]) -> u64 {
    let (blocks, rest) = bytes.as_chunks::<{ 8 * LANES }>();
    let step = |chain: u64, word: u64| (chain ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let rest = rest.iter().fold(bytes.len() as u64, |chain, &byte| step(chain, byte.into()));
    let [sums, sums_of_sums] = pulp::Arch::new().dispatch(Fletcher { blocks });
    sums.into_iter().chain(sums_of_sums).fold(rest, step)
}

/// The sums of Fletcher's checksum, which see values and their places, in lanes that vectors can hold. A value in place of a
/// closure, which the compiler would leave outside of the function that may use the machine's vectors.
struct Fletcher<'a> {
    blocks: &'a [[u8; 8 * LANES]],
}

impl pulp::NullaryFnOnce for Fletcher<'_> {
    type Output = [[u64; LANES]; 2];

    #[inline(always)]
    fn call(self) -> Self::Output {
        let [mut sums, mut sums_of_sums] = [[0_u64; LANES]; 2];
        for block in self.blocks {
            let (words, _) = block.as_chunks::<8>();
            for ((sum, sum_of_sums), word) in sums.iter_mut().zip(&mut sums_of_sums).zip(words) {
                *sum = sum.wrapping_add(u64::from_le_bytes(*word));
                *sum_of_sums = sum_of_sums.wrapping_add(*sum);
            }
        }
        [sums, sums_of_sums]
    }
}

/// Joins the hashes of blocks that hold `bytes` bytes together. All but the last are full, and BLAKE3 splits its input at
/// a power of two of chunks, hence always between two blocks.
fn join(hashes: &[[u8; 32]], bytes: u64, root: bool) -> [u8; 32] {
    match hashes {
        [] => [0; 32],
        [hash] => *hash,
        _ => {
            let left_bytes = left_subtree_len(bytes);
            let mut left = 1;
            while left * 2 < hashes.len() {
                left *= 2;
            }
            let (left, right) = hashes.split_at(left);
            let (left, right) = (join(left, left_bytes, false), join(right, bytes - left_bytes, false));
            if root {
                *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
            } else {
                merge_subtrees_non_root(&left, &right, Mode::Hash)
            }
        }
    }
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
