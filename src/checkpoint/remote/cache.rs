//! What was fetched, on this machine, laid out as huggingface_hub does it, so that both find what the other has fetched:
//! `REPOSITORY/{blobs/DIGEST, refs/REVISION, snapshots/COMMIT/FILE}`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::Source;
use super::download::Downloader;
use super::listing::{Listing, RemoteFile};
use crate::clock::Clock;

/// Ranges that are fetched at once.
const THREADS: usize = 8;
/// How often somebody who waits is told how far it is.
const TELL: Duration = Duration::from_millis(250);

/// The cache of one repository.
pub(super) struct Repository {
    pub root: PathBuf,
    /// Bytes of one checkpoint that may be fetched.
    pub max_bytes: u64,
    /// Bytes of one range.
    pub part: u64,
    /// Bytes that may still be written where a folder is.
    pub room: Room,
    pub clock: Clock,
}

/// How much room there is on a folder's volume; `None` where nobody says.
pub(super) type Room = fn(&Path) -> Option<u64>;

/// As the system says it for whoever has no special rights.
#[cfg(target_os = "linux")]
pub(super) fn room(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn room(_: &Path) -> Option<u64> {
    None
}

impl Repository {
    /// Fetches what is not there yet, and gives the folder of the snapshot. `revision` is the name under which the listing's
    /// commit is remembered.
    pub fn fetch(
        &self,
        source: &dyn Source,
        listing: &Listing,
        subdir: &str,
        revision: &str,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<PathBuf, String> {
        let (total, blobs) = (listing.files.iter().map(|file| file.bytes).sum(), self.root.join("blobs"));
        if total > self.max_bytes {
            let most = self.max_bytes;
            return Err(format!("has {total} bytes, expected at most {most} (setting download.max_bytes)"));
        }
        std::fs::create_dir_all(&blobs).map_err(|error| format!("{}: {error}", blobs.display()))?;
        let needed = missing(&blobs, &listing.files);
        if let Some(room) = (self.room)(&blobs).filter(|room| *room < needed) {
            return Err(format!("needs {needed} more bytes, and the volume of {} has {room} left", blobs.display()));
        }
        self.download(source, &listing.files, &blobs, total, progress)?;
        let folder = self.snapshot(&listing.commit, subdir);
        let depth = 2 + subdir.split('/').filter(|segment| !segment.is_empty()).count();
        for file in &listing.files {
            link(&blobs, &folder, depth, file).map_err(|error| format!("{}: {error}", folder.join(&file.name).display()))?;
        }
        let refs = self.root.join("refs");
        write_whole(&refs, revision, &listing.commit).map_err(|error| format!("{}: {error}", refs.display()))?;
        Ok(folder)
    }

    pub fn snapshot(&self, commit: &str, subdir: &str) -> PathBuf {
        self.root.join("snapshots").join(commit).join(subdir)
    }

    fn download(
        &self,
        source: &dyn Source,
        files: &[RemoteFile],
        blobs: &Path,
        total: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), String> {
        let (done, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        let downloader = Downloader { source, clock: &self.clock, part: self.part, threads: THREADS, done: &done };
        let teller = std::thread::current();
        let result = std::thread::scope(|scope| {
            let fetching = scope.spawn(|| {
                let result = downloader.fetch(blobs, files);
                ended.store(true, Ordering::Release);
                teller.unpark();
                result
            });
            while !ended.load(Ordering::Acquire) {
                progress(done.load(Ordering::Relaxed).min(total), total);
                std::thread::park_timeout(TELL);
            }
            fetching.join().unwrap_or_else(|_| Err("the download panicked".to_owned()))
        });
        if result.is_ok() {
            progress(total, total);
        }
        result
    }
}

/// Bytes of the files that are not on the disk yet. What was begun has its whole length from the start, but blocks only for
/// what has been written.
fn missing(blobs: &Path, files: &[RemoteFile]) -> u64 {
    let each: BTreeMap<&str, u64> = files.iter().map(|file| (file.digest.hex(), file.bytes)).collect();
    let missing = |(name, bytes): (&str, u64)| {
        let whole = std::fs::metadata(blobs.join(name)).is_ok_and(|found| found.len() == bytes);
        let begun = std::fs::metadata(blobs.join(format!("{name}.incomplete"))).map_or(0, |found| written(&found));
        if whole { 0 } else { bytes.saturating_sub(begun) }
    };
    each.into_iter().map(missing).sum()
}

#[cfg(unix)]
fn written(found: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(found).saturating_mul(512)
}

#[cfg(not(unix))]
fn written(_: &std::fs::Metadata) -> u64 {
    0
}

/// Gives a file of the cache its name in the snapshot.
fn link(blobs: &Path, folder: &Path, depth: usize, file: &RemoteFile) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let name = folder.join(&file.name);
    let relative = PathBuf::from("../".repeat(depth)).join("blobs").join(file.digest.hex());
    if std::fs::read_link(&name).is_ok_and(|found| found == relative) && name.exists() {
        return Ok(());
    }
    // Whatever stands there is of an attempt that did not end, or points nowhere.
    match std::fs::remove_file(&name) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&relative, &name);
    #[cfg(not(unix))]
    let linked = Err(std::io::Error::other("no links"));
    match linked {
        // Another process was faster.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Ok(()) => Ok(()),
        Err(_) => std::fs::copy(blobs.join(file.digest.hex()), &name).map(drop),
    }
}

/// Writes a small file so that nobody sees half of it.
fn write_whole(folder: &Path, name: &str, text: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    // Whoever else writes the same, in this process or another, has another name for it meanwhile.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let temporary = folder.join(format!("{name}.{}.{}.tmp", std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&temporary, text)?;
    std::fs::rename(temporary, folder.join(name))
}
