use super::*;
use crate::checkpoint::{Dtype, Manifest, TensorInfo};

#[test]
fn blocks_join_to_the_plain_hash_of_all_bytes() {
    for dtype in [Dtype::U8, Dtype::Bf16, Dtype::F32, Dtype::F64] {
        let block = BLOCK_ELEMENTS;
        for elements in [0, 1, 511, block - 1, block, block + 1, 2 * block, 2 * block + 7, 3 * block, 5 * block + 1, 8 * block, 9 * block] {
            let info = TensorInfo { dtype, shape: vec![elements] };
            let bytes: Vec<u8> = (0..elements * dtype.size()).map(|i| (i % 251) as u8).collect();
            let blocks = elements.div_ceil(block).max(1);
            let part = |index| {
                let range = block_range(&info, index);
                hash_block(&bytes[range.start * dtype.size()..range.end * dtype.size()], index, &info, blocks)
            };
            let hashes: Vec<_> = (0..blocks).map(part).collect();
            assert_eq!(join(&hashes, info.bytes(), true), *blake3::hash(&bytes).as_bytes(), "{elements} of {dtype}");
        }
    }
}

fn hash(remembered: &Remembered) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    remembered.hash_tensor("w", &mut hasher).unwrap();
    *hasher.finalize().as_bytes()
}

/// Tensors in memory that somebody may change, and a count of reads.
struct Memory {
    manifest: Manifest,
    values: std::sync::Mutex<Vec<f32>>,
    reads: std::sync::atomic::AtomicUsize,
}

impl Memory {
    fn new(elements: usize) -> Arc<Self> {
        let info = TensorInfo { dtype: Dtype::F32, shape: vec![elements] };
        let manifest = [("w".to_owned(), info)].into_iter().collect();
        Arc::new(Self { manifest, values: vec![1.5; elements].into(), reads: 0.into() })
    }

    fn remembered(self: &Arc<Self>) -> Remembered {
        Remembered::new(Arc::clone(self) as Arc<dyn TensorSource>, "rm-0".to_owned())
    }
}

impl TensorSource for Memory {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn read(&self, _: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        *into = Elements::F32(self.values.lock().unwrap()[range].to_vec());
        Ok(())
    }
}

#[test]
fn what_was_read_before_is_not_read_again_for_the_hash() {
    let memory = Memory::new(3 * BLOCK_ELEMENTS + 5);
    let untouched = hash(&memory.remembered());
    let remembered = memory.remembered();
    memory.reads.store(0, std::sync::atomic::Ordering::Relaxed);
    let mut into = Elements::default();
    for block in [2, 0, 3] {
        remembered.read("w", block_range(memory.manifest.get("w").unwrap(), block), &mut into).unwrap();
    }
    remembered.read("w", 5..9, &mut into).unwrap();
    assert_eq!(hash(&remembered), untouched);
    assert_eq!(hash(&remembered), untouched);
    assert_eq!(memory.reads.load(std::sync::atomic::Ordering::Relaxed), 5);
}

#[test]
fn one_changed_bit_changes_the_hash() {
    let memory = Memory::new(2 * BLOCK_ELEMENTS);
    let before = hash(&memory.remembered());
    memory.values.lock().unwrap()[BLOCK_ELEMENTS + 3] = -1.5;
    assert_ne!(hash(&memory.remembered()), before);
}

#[test]
fn bytes_that_change_between_two_reads_are_an_error() {
    let memory = Memory::new(BLOCK_ELEMENTS + 1);
    let remembered = memory.remembered();
    let mut into = Elements::default();
    remembered.read("w", 0..BLOCK_ELEMENTS, &mut into).unwrap();
    remembered.read("w", 0..BLOCK_ELEMENTS, &mut into).unwrap();
    memory.values.lock().unwrap()[7] = 2.0;
    let error = remembered.read("w", 0..BLOCK_ELEMENTS, &mut into).unwrap_err().to_string();
    assert_eq!(error, "rm-0: tensor \"w\": elements 0..65536 have changed since they were first read; the file was changed while in use");
}

#[test]
fn a_glance_is_remembered_until_the_hash_is_taken() {
    let memory = Memory::new(2 * BLOCK_ELEMENTS);
    let (remembered, mut into) = (memory.remembered(), Elements::default());
    remembered.glance("w", 0..BLOCK_ELEMENTS, &mut into).unwrap();
    remembered.glance("w", 0..BLOCK_ELEMENTS, &mut into).unwrap();
    remembered.read("w", 0..BLOCK_ELEMENTS, &mut into).unwrap();
    assert_eq!(remembered.content_hash(["w"]).unwrap(), memory.remembered().content_hash(["w"]).unwrap());
    let remembered = memory.remembered();
    remembered.glance("w", BLOCK_ELEMENTS..2 * BLOCK_ELEMENTS, &mut into).unwrap();
    memory.values.lock().unwrap()[BLOCK_ELEMENTS + 7] = 1.25;
    let told = |outcome: Result<(), SourceError>| outcome.unwrap_err().to_string();
    let expected = "rm-0: tensor \"w\": elements 65536..131072 have changed since they were first read; the file was changed while in use";
    assert_eq!(told(remembered.glance("w", BLOCK_ELEMENTS..2 * BLOCK_ELEMENTS, &mut into)), expected);
    assert_eq!(told(remembered.read("w", BLOCK_ELEMENTS..2 * BLOCK_ELEMENTS, &mut into)), expected);
    assert!(remembered.content_hash(["w"]).is_err());
}

proptest::proptest! {
    #[test]
    fn a_changed_bit_changes_the_checksum(bytes in proptest::collection::vec(0_u8.., 1..200), at: usize, bit in 0_u32..8) {
        let mut changed = bytes.clone();
        changed[at % bytes.len()] ^= 1 << bit;
        proptest::prop_assert_ne!(checksum(&changed), checksum(&bytes));
        changed = bytes.clone();
        changed.pop();
        proptest::prop_assert_ne!(checksum(&changed), checksum(&bytes));
    }
}
