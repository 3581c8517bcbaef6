//! A tensor source streamed to disk as a Hugging Face checkpoint.
//!
//! Reading (and with it averaging and hashing) uses all threads of the rayon pool, chunk by chunk; a thread of its own
//! writes the chunks in the order of the file and asks the disk for them as it goes, so that the last sync has little left
//! to wait for. In memory are a few chunks, whatever the size of the model and of its tensors.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::shards::{self, Metadata, Shard};
use super::staging::{FileError, Staging};
use crate::checkpoint::{Elements, Manifest, SourceError, TensorInfo, TensorSource};

/// Elements that are read at once: 8 MiB of bfloat16.
const CHUNK_ELEMENTS: usize = 4 << 20;
/// Chunks between the reader and the writer.
const CHUNKS: usize = 3;
/// A tensor below this is read into a buffer of its own: shrinking a large one would have it cleared when it grows again.
const SMALL_ELEMENTS: usize = 64 << 10;
/// How much is written before the disk is asked to have it.
const SYNC_BYTES: u64 = 32 << 20;

/// As transformers' `save_pretrained` does it.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Why nothing was written.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0}")]
    Refused(String),
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// What is told to whoever waits: bytes done, bytes in all. The answer may end the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Writes all tensors of a source into the folder, with an index if there are several files. `metadata` is asked twice:
/// first for texts as long as the last ones, which reserves room for them in front of the tensors, and when every tensor
/// has been read for the texts themselves, because hashes of what was read are known only then.
pub fn write_tensors(
    source: &dyn TensorSource,
    staging: &Staging,
    max_shard_bytes: u64,
    metadata: &mut dyn FnMut(Stage) -> Result<Metadata, SourceError>,
    progress: Progress<'_>,
) -> Result<Vec<Shard>, WriteError> {
    let shards = shards::split(source.manifest(), max_shard_bytes);
    let draft = metadata(Stage::Draft)?;
    let mut files = Vec::new();
    for shard in &shards {
        let (path, file) = staging.create(&shard.file)?;
        files.push(Output { path, file, header: shard.header(&draft, 0).len() });
    }
    stream(source, &shards, &files, progress)?;
    let last = metadata(Stage::Last)?;
    for (shard, output) in shards.iter().zip(&files) {
        let header = shard.header(&last, output.header);
        if header.len() != output.header {
            return Err(WriteError::Refused("the metadata are longer than the room that was reserved for them".to_owned()));
        }
        write_all_at(&output.file, &header, 0).and_then(|()| output.file.sync_all()).map_err(|error| output.cannot(&error))?;
    }
    if let Some(index) = shards::index(&shards) {
        staging.write("model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
    }
    Ok(shards)
}

/// When metadata are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before reading: only the lengths matter.
    Draft,
    /// After every tensor has been read.
    Last,
}

/// A file that is being written.
struct Output {
    path: PathBuf,
    file: File,
    /// Bytes before the tensors.
    header: usize,
}

impl Output {
    fn cannot(&self, error: &io::Error) -> FileError {
        FileError::new(&self.path, format_args!("cannot be written: {error}"))
    }
}

/// Bytes of the buffers of [`write_tensors`], at most.
pub(super) fn buffer_bytes(manifest: &Manifest) -> u64 {
    let chunk = |info: &TensorInfo| (info.elements().min(CHUNK_ELEMENTS) * info.dtype.size()) as u64;
    CHUNKS as u64 * manifest.iter().map(|(_, info)| chunk(info)).max().unwrap_or_default()
}

/// Reads every chunk of every shard and hands it to the writer's thread.
fn stream(source: &dyn TensorSource, shards: &[Shard], files: &[Output], progress: Progress<'_>) -> Result<(), WriteError> {
    let total: u64 = shards.iter().map(Shard::data_bytes).sum();
    let (full, chunks) = sync_channel(CHUNKS - 1);
    let (used, returned) = sync_channel(CHUNKS);
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new()
            .name("warm-write".to_owned())
            .spawn_scoped(scope, move || write_chunks(files, &chunks, &used))
            .map_err(|error| WriteError::Refused(format!("the writing thread cannot be started: {error}")))?;
        let mut reader = Reader { source, full, returned, progress, done: 0, total };
        let outcome = reader.read(shards);
        // The writer ends when nobody can send any more.
        drop(reader);
        match writer.join() {
            Ok(Ok(())) => outcome,
            // A writer that failed explains why the reader could not go on.
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(WriteError::Refused("the writing thread panicked".to_owned())),
        }
    })
}

/// Some elements on their way to a file.
struct Chunk {
    /// Which file.
    place: usize,
    elements: Elements,
    /// Whether the buffer goes back to the reader.
    pooled: bool,
}

struct Reader<'a> {
    source: &'a dyn TensorSource,
    full: SyncSender<Chunk>,
    returned: Receiver<Elements>,
    progress: Progress<'a>,
    done: u64,
    total: u64,
}

impl Reader<'_> {
    fn read(&mut self, shards: &[Shard]) -> Result<(), WriteError> {
        let mut free: VecDeque<Elements> = (0..CHUNKS).map(|_| Elements::default()).collect();
        for (place, shard) in shards.iter().enumerate() {
            for (name, info) in &shard.tensors {
                self.tensor(place, name, info, &mut free)?;
            }
        }
        Ok(())
    }

    fn tensor(&mut self, place: usize, name: &str, info: &TensorInfo, free: &mut VecDeque<Elements>) -> Result<(), WriteError> {
        let elements = info.elements();
        for begin in (0..elements).step_by(CHUNK_ELEMENTS) {
            let range = begin..elements.min(begin + CHUNK_ELEMENTS);
            let bytes = (range.len() * info.dtype.size()) as u64;
            let pooled = elements >= SMALL_ELEMENTS;
            free.extend(self.returned.try_iter());
            let buffer = match pooled {
                false => Some(Elements::default()),
                true => free.pop_front().or_else(|| self.returned.recv().ok()),
            };
            // Without a writer there is nothing to do; it says itself why it has gone.
            let mut elements = buffer.ok_or(WriteError::Interrupted)?;
            self.source.read(name, range, &mut elements)?;
            self.full.send(Chunk { place, elements, pooled }).map_err(|_| WriteError::Interrupted)?;
            self.done += bytes;
            if (self.progress)(self.done, self.total).is_break() {
                return Err(WriteError::Interrupted);
            }
        }
        Ok(())
    }
}

/// Appends chunk after chunk to its file. Room for the headers is left in front.
fn write_chunks(files: &[Output], chunks: &Receiver<Chunk>, used: &SyncSender<Elements>) -> Result<(), FileError> {
    let (mut current, mut unsynced) = (None, 0);
    for Chunk { place, elements, pooled } in chunks {
        let Some(output) = files.get(place) else { continue };
        let mut file = &output.file;
        let written = (|| {
            if current.replace(place) != Some(place) {
                file.write_all(&vec![0; output.header])?;
                unsynced = 0;
            }
            elements.with_little_endian(|bytes| file.write_all(bytes))?;
            unsynced += elements.bytes().len() as u64;
            if unsynced >= SYNC_BYTES {
                file.sync_data()?;
                unsynced = 0;
            }
            Ok(())
        })();
        written.map_err(|error| output.cannot(&error))?;
        if pooled {
            // There are as many places as buffers, so this fails only when the reader has gone.
            let _ = used.try_send(elements);
        }
    }
    Ok(())
}

/// Writes at a place of a file, wherever its cursor stands.
#[cfg(unix)]
pub(super) fn write_all_at(file: &File, bytes: &[u8], begin: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, begin)
}

#[cfg(windows)]
pub(super) fn write_all_at(file: &File, mut bytes: &[u8], mut begin: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, begin) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = &bytes[count..];
                begin += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Refuses a place that holds something already: an empty folder is no loss, a checkpoint is replaced only on request, and
/// anything else is never removed.
pub fn check_place(place: &Path, overwrite: bool) -> Result<(), WriteError> {
    let wrong = |problem: &str| Err(WriteError::Refused(format!("{}: {problem}", place.display())));
    let found = match std::fs::metadata(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return wrong(&format!("cannot be opened: {error}")),
        Ok(found) => found,
    };
    if !found.is_dir() {
        return wrong("is a file, expected a new folder");
    }
    let empty = std::fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_none());
    let checkpoint = place.join("config.json").exists();
    match (empty, checkpoint, overwrite) {
        (true, _, _) | (false, true, true) => Ok(()),
        (false, _, false) => wrong("stands there already; choose another place, or say --overwrite"),
        (false, false, true) => wrong("holds no checkpoint (no config.json), so it is not overwritten; choose another place"),
    }
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
