//! One file by ranges, several at a time: resumed where it stopped, retried where that helps, checked at the end.
//!
//! Bytes go into `DIGEST.incomplete`; `DIGEST.parts` says which ranges of it are whole. A file gets its own name only when
//! its checksum is right.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::listing::{Digest, RemoteFile};
use super::{Source, Trouble};
use crate::clock::Clock;
use crate::lock::lock;

/// Failures one after the other without a byte in between before a range is given up.
pub(super) const ATTEMPTS: u32 = 6;
/// The first wait after a failure; each one after it is twice as long.
pub(super) const FIRST_WAIT: Duration = Duration::from_millis(500);
/// A wait is never longer, whatever the server asks for.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Bytes that are read and written at once.
const BUFFER: usize = 256 << 10;

/// How files are fetched.
pub(super) struct Downloader<'a> {
    pub source: &'a dyn Source,
    pub clock: &'a Clock,
    /// Bytes of one range.
    pub part: u64,
    pub threads: usize,
    /// Bytes that are there, of all files.
    pub done: &'a AtomicU64,
}

/// A file on its way.
struct Job<'a> {
    file: &'a RemoteFile,
    target: PathBuf,
    incomplete: File,
    parts: Mutex<Parts>,
    /// Held while the file is written, so that two processes do not write the same one.
    _lock: Option<File>,
}

struct Parts {
    done: BTreeSet<u64>,
    log: File,
}

impl Downloader<'_> {
    /// Fetches all files that are not there yet. Two processes may do the same at once.
    pub fn fetch(&self, blobs: &Path, files: &[RemoteFile]) -> Result<(), String> {
        // In one order for all processes, and each content once, because a lock is waited for.
        let mut files: Vec<&RemoteFile> = files.iter().collect();
        files.sort_by(|a, b| a.digest.hex().cmp(b.digest.hex()));
        files.dedup_by(|a, b| a.digest == b.digest);
        let mut jobs = Vec::new();
        for file in files {
            let target = blobs.join(file.digest.hex());
            match Job::open(file, target, self.part) {
                Ok(Some(job)) => {
                    let parts = lock(&job.parts);
                    let there: u64 = parts.done.iter().map(|&part| self.range(file, part).1).sum();
                    drop(parts);
                    self.done.fetch_add(there, Ordering::Relaxed);
                    jobs.push(job);
                }
                Ok(None) => drop(self.done.fetch_add(file.bytes, Ordering::Relaxed)),
                Err(error) => return Err(format!("{}: {error}", file.name)),
            }
        }
        let missing = |job: &Job<'_>| {
            let parts = lock(&job.parts);
            (0..job.file.bytes.div_ceil(self.part)).filter(|part| !parts.done.contains(part)).collect::<Vec<_>>()
        };
        let work: Vec<(usize, u64)> =
            jobs.iter().enumerate().flat_map(|(i, job)| missing(job).into_iter().map(move |part| (i, part))).collect();
        let (next, failed, problem) = (AtomicU64::new(0), AtomicBool::new(false), Mutex::new(None));
        std::thread::scope(|scope| {
            for _ in 0..self.threads.min(work.len()) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let place = next.fetch_add(1, Ordering::Relaxed) as usize;
                        let Some(&(i, part)) = work.get(place) else { return };
                        if let Err(words) = self.part(&jobs[i], part, &failed) {
                            failed.store(true, Ordering::Relaxed);
                            lock(&problem).get_or_insert(format!("{}: {words}", jobs[i].file.name));
                        }
                    }
                });
            }
        });
        if let Some(words) = problem.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(words);
        }
        jobs.into_iter().try_for_each(|job| {
            let name = job.file.name.clone();
            job.finish().map_err(|problem| format!("{name}: {problem}"))
        })
    }

    /// Where a part begins, and how long it is.
    fn range(&self, file: &RemoteFile, part: u64) -> (u64, u64) {
        let begin = part * self.part;
        (begin, self.part.min(file.bytes.saturating_sub(begin)))
    }

    fn part(&self, job: &Job<'_>, part: u64, failed: &AtomicBool) -> Result<(), String> {
        let (begin, length) = self.range(job.file, part);
        let (mut at, end, mut failures) = (begin, begin + length, 0);
        while at < end {
            if failed.load(Ordering::Relaxed) {
                return Err("given up, because another file failed".to_owned());
            }
            let before = at;
            match self.read(job, &mut at, end) {
                Ok(()) => failures = 0,
                Err(Trouble::Final(problem)) => return Err(problem),
                Err(Trouble::Passing { problem, wait }) => {
                    failures = if at > before { 1 } else { failures + 1 };
                    if failures > ATTEMPTS {
                        return Err(format!("{problem} ({ATTEMPTS} attempts)"));
                    }
                    let wait = wait.unwrap_or(FIRST_WAIT * 2u32.pow(failures - 1)).min(LONGEST_WAIT);
                    tracing::debug!(file = job.file.name, at, problem, ?wait, "asking again");
                    self.clock.pause(wait);
                }
            }
        }
        job.note(part).map_err(|error| error.to_string())
    }

    /// Asks for what is left of a range and writes what comes, moving `at` along.
    fn read(&self, job: &Job<'_>, at: &mut u64, end: u64) -> Result<(), Trouble> {
        let mut body = self.source.open(job.file, *at, end)?;
        let mut buffer = vec![0; BUFFER];
        while *at < end {
            let most = buffer.len().min(usize::try_from(end - *at).unwrap_or(usize::MAX));
            let got = match body.read(&mut buffer[..most]) {
                Ok(0) => return Err(Trouble::passing(format!("the answer ended {} bytes early", end - *at))),
                Ok(got) => got,
                Err(error) => return Err(Trouble::passing(format!("the connection broke: {error}"))),
            };
            write_at(&job.incomplete, &buffer[..got], *at).map_err(|error| Trouble::Final(format!("cannot be written: {error}")))?;
            *at += got as u64;
            self.done.fetch_add(got as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl<'a> Job<'a> {
    /// `None` for a file that is there already.
    fn open(file: &'a RemoteFile, target: PathBuf, part: u64) -> std::io::Result<Option<Self>> {
        let beside = |suffix: &str| PathBuf::from(format!("{}.{suffix}", target.display()));
        let is_there = || std::fs::metadata(&target).is_ok_and(|found| found.len() == file.bytes);
        if is_there() {
            return Ok(None);
        }
        let lock = File::create(beside("lock"))?;
        // Some network volumes have no locks; then two processes that start at once do the same work twice.
        let lock = lock.lock().is_ok().then_some(lock);
        // Whoever held the lock before may have fetched it.
        if is_there() {
            return Ok(None);
        }
        let incomplete = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(beside("incomplete"))?;
        let mut log = OpenOptions::new().create(true).read(true).append(true).open(beside("parts"))?;
        let mut text = String::new();
        // What is no list of parts, or of parts of another size, is begun anew.
        let begun = incomplete.metadata()?.len() == file.bytes && (&log).take(1 << 20).read_to_string(&mut text).is_ok();
        let mut lines = text.lines();
        let done = match lines.next() {
            Some(first) if begun && first == format!("part {part}") => lines.filter_map(|line| line.parse().ok()).collect(),
            _ => {
                log.set_len(0)?;
                writeln!(log, "part {part}")?;
                BTreeSet::new()
            }
        };
        incomplete.set_len(file.bytes)?;
        Ok(Some(Self { file, target, incomplete, parts: Mutex::new(Parts { done, log }), _lock: lock }))
    }

    /// Remembers that a part is whole.
    fn note(&self, part: u64) -> std::io::Result<()> {
        let mut parts = lock(&self.parts);
        writeln!(parts.log, "{part}")?;
        parts.done.insert(part);
        Ok(())
    }

    /// Checks the whole file and gives it its name.
    fn finish(mut self) -> Result<(), String> {
        let beside = |suffix: &str| PathBuf::from(format!("{}.{suffix}", self.target.display()));
        let found = digest(&mut self.incomplete, self.file).map_err(|error| format!("cannot be read: {error}"))?;
        if let Some(found) = found.filter(|found| found != self.file.digest.hex()) {
            // What is wrong somewhere is fetched anew as a whole.
            for left in ["incomplete", "parts"] {
                let _ = std::fs::remove_file(beside(left));
            }
            // Without locks, somebody else may have given it its name while these bytes were being written.
            if !is_whole(&self.target, self.file) {
                let _ = std::fs::remove_file(&self.target);
            }
            return Err(format!("expected checksum {}, found {found}; the next attempt begins anew", self.file.digest.hex()));
        }
        let named = self.incomplete.sync_all().and_then(|()| std::fs::rename(beside("incomplete"), &self.target));
        match named {
            // Without locks, somebody else had the same file in hand and has given it its name: that is as good, if it is whole.
            Err(error) if error.kind() == ErrorKind::NotFound && is_whole(&self.target, self.file) => {}
            named => named.map_err(|error| format!("cannot be put in its place: {error}"))?,
        }
        for left in ["parts", "lock"] {
            let _ = std::fs::remove_file(beside(left));
        }
        Ok(())
    }
}

/// Whether a file is what was promised, as far as something was.
fn is_whole(path: &Path, file: &RemoteFile) -> bool {
    let found = || -> std::io::Result<bool> {
        let mut content = File::open(path)?;
        let length = content.metadata()?.len() == file.bytes;
        Ok(length && digest(&mut content, file)?.is_none_or(|found| found == file.digest.hex()))
    };
    found().unwrap_or(false)
}

/// The checksum that the content has; `None` where none was promised.
fn digest(content: &mut File, file: &RemoteFile) -> std::io::Result<Option<String>> {
    use std::io::Seek;
    let mut context = match file.digest {
        Digest::Version(_) => return Ok(None),
        Digest::Sha256(_) => Context::new(&SHA256),
        Digest::GitBlob(_) => {
            let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", file.bytes).as_bytes());
            context
        }
    };
    content.rewind()?;
    let mut buffer = vec![0; BUFFER];
    loop {
        match content.read(&mut buffer)? {
            0 => break,
            got => context.update(&buffer[..got]),
        }
    }
    Ok(Some(hex(context.finish().as_ref())))
}

/// As a file of the cache is called.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom};
    // One handle has one position, so one thread at a time moves and writes.
    static POSITION: Mutex<()> = Mutex::new(());
    let _position = lock(&POSITION);
    file.seek(SeekFrom::Start(at))?;
    file.write_all(bytes)
}
