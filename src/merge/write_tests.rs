use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::checkpoint::Dtype;

/// Counts up from zero in every tensor, and fails at one read.
struct Counting {
    manifest: Manifest,
    reads: AtomicUsize,
    fails_at: usize,
}

impl Counting {
    fn new(tensors: &[(&str, usize)], fails_at: usize) -> Self {
        let info = |&(name, elements): &(&str, usize)| (name.to_owned(), TensorInfo { dtype: Dtype::F32, shape: vec![elements] });
        Self { manifest: tensors.iter().map(info).collect(), reads: AtomicUsize::new(0), fails_at }
    }
}

impl TensorSource for Counting {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        if self.reads.fetch_add(1, Ordering::Relaxed) == self.fails_at {
            return Err(SourceError::NoSuchTensor { tensor: name.to_owned(), problem: "vanished".to_owned() });
        }
        *into = Elements::F32(range.map(|index| index as f32).collect());
        Ok(())
    }
}

fn no_metadata(_: Stage) -> Result<Metadata, SourceError> {
    Ok(Metadata::new())
}

const TENSORS: [(&str, usize); 5] = [("a", CHUNK_ELEMENTS * 2 + 7), ("b", SMALL_ELEMENTS), ("c", 3), ("d", 0), ("e", SMALL_ELEMENTS - 1)];

#[test]
fn tensors_of_any_size_arrive_whole_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    for max_shard_bytes in [1 << 40, 1 << 20, 1] {
        let staging = Staging::new(&dir.path().join("out")).unwrap();
        let mut told = Vec::new();
        let mut tell = |done, total| {
            told.push((done, total));
            ControlFlow::Continue(())
        };
        let source = Counting::new(&TENSORS, usize::MAX);
        write_tensors(&source, &staging, max_shard_bytes, &mut no_metadata, &mut tell).unwrap();
        let written = crate::checkpoint::Weights::open(staging.folder()).unwrap();
        assert_eq!(written.manifest(), source.manifest());
        for (name, elements) in TENSORS {
            let (mut found, mut expected) = (Elements::default(), Elements::default());
            written.read(name, 0..elements, &mut found).unwrap();
            source.read(name, 0..elements, &mut expected).unwrap();
            assert!(found == expected, "{name} in files of {max_shard_bytes} bytes");
        }
        let total = TENSORS.iter().map(|(_, elements)| 4 * *elements as u64).sum();
        assert_eq!(told.last(), Some(&(total, total)));
        assert!(told.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}

#[test]
fn a_read_that_fails_anywhere_ends_the_writing_with_its_error() {
    let dir = tempfile::tempdir().unwrap();
    // Three chunks of `a`, one each of `b`, `c` and `e`.
    for fails_at in 0..6 {
        let staging = Staging::new(&dir.path().join("out")).unwrap();
        let error =
            write_tensors(&Counting::new(&TENSORS, fails_at), &staging, 1 << 30, &mut no_metadata, &mut |_, _| ControlFlow::Continue(()))
                .unwrap_err();
        assert!(matches!(&error, WriteError::Source(SourceError::NoSuchTensor { problem, .. }) if problem == "vanished"), "{error}");
        drop(staging);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_file_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, b"").unwrap();
    // Open for reading only, so that every write fails: before the reader has filled all buffers, and after.
    for tensors in [&TENSORS[2..3], &TENSORS] {
        let source = Counting::new(tensors, usize::MAX);
        let files = [Output { path: path.clone(), file: File::open(&path).unwrap(), header: 8 }];
        let shards = shards::split(source.manifest(), 1 << 40);
        let error = stream(&source, &shards, &files, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        let words = error.to_string();
        assert!(words.starts_with(&format!("{}: cannot be written: ", path.display())), "{words}");
    }
}

#[test]
fn whoever_waits_may_end_it() {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::new(&dir.path().join("out")).unwrap();
    let mut stop = |done, total| if done * 2 > total { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let source = Counting::new(&TENSORS, usize::MAX);
    let error = write_tensors(&source, &staging, 1 << 30, &mut no_metadata, &mut stop).unwrap_err();
    assert_eq!((error, source.reads.into_inner()), (WriteError::Interrupted, 2));
}

#[test]
fn metadata_that_outgrow_their_room_are_an_error_and_never_overwrite_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::new(&dir.path().join("out")).unwrap();
    let mut growing = |stage| {
        let length = if stage == Stage::Draft { 1 } else { 100 };
        Ok(Metadata::from([("key".to_owned(), "x".repeat(length))]))
    };
    let source = Counting::new(&TENSORS[2..3], usize::MAX);
    let error = write_tensors(&source, &staging, 1, &mut growing, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("longer than the room"), "{error}");
}

#[test]
fn a_place_is_taken_only_where_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    for name in ["empty", "checkpoint", "documents"] {
        std::fs::create_dir(place(name)).unwrap();
    }
    for file in ["checkpoint/config.json", "documents/letter", "file"] {
        std::fs::write(place(file), b"{}").unwrap();
    }
    let words = |name, overwrite| check_place(&place(name), overwrite).err().map(|error| error.to_string()).unwrap_or_default();
    for name in ["new", "empty"] {
        assert_eq!((words(name, false), words(name, true)), (String::new(), String::new()));
    }
    assert!(words("checkpoint", false).contains("stands there already"), "{}", words("checkpoint", false));
    assert_eq!(words("checkpoint", true), "");
    assert!(words("documents", true).contains("holds no checkpoint"), "{}", words("documents", true));
    assert!(words("file", true).contains("is a file"), "{}", words("file", true));
}
