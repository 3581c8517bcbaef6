//! A hub and its cache on this machine, laid out as huggingface_hub does it, so that both find what the other has fetched:
//! `models--ORG--NAME/{blobs/DIGEST, refs/REVISION, snapshots/COMMIT/FILE}`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ureq::Agent;
use ureq::config::RedirectAuthHeaders;

use super::HubPath;
use super::download::{Downloader, get};
use super::listing::{self, Listing, RemoteFile, is_hex};
use crate::checkpoint::CheckpointError;
use crate::clock::Clock;

/// Bytes of one range: large enough to be fast, small enough that a broken connection costs little.
const PART: u64 = 64 << 20;
/// Ranges that are fetched at once.
const THREADS: usize = 8;
/// Names and sizes of a revision's files.
const MAX_LISTING_BYTES: u64 = 32 << 20;
/// A token is a line.
const MAX_TOKEN_BYTES: u64 = 4096;
/// How often somebody who waits is told how far it is.
const TELL: Duration = Duration::from_millis(250);

/// Where models come from, and where they are kept.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
    /// Bytes of one checkpoint that may be fetched.
    max_bytes: u64,
    part: u64,
    clock: Clock,
}

impl fmt::Debug for Hub {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, cache, offline, .. } = self;
        f.debug_struct("Hub").field("endpoint", endpoint).field("cache", cache).field("offline", offline).finish_non_exhaustive()
    }
}

/// A checkpoint that was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub folder: PathBuf,
    /// The place with the commit that its revision stands for: what the checkpoint is called from now on.
    pub origin: HubPath,
}

impl Hub {
    /// As other tools of the hub are told: `HF_ENDPOINT`, `HF_TOKEN` (or the file `HF_TOKEN_PATH`, `HF_HOME/token`),
    /// `HF_HUB_CACHE` or `HF_HOME`, `HF_HUB_OFFLINE`. At most `max_bytes` are fetched for one checkpoint.
    pub fn from_environment(environment: &[(String, String)], max_bytes: u64, clock: Clock) -> Self {
        let get = |name: &str| environment.iter().find(|(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.clone());
        let home = get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = get("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(PathBuf::from(get("HOME")?).join(".cache")));
            cache.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
        });
        let file = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let on = |value: String| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: get("HF_TOKEN").or_else(|| read_token(&file)).map(|token| token.trim().to_owned()),
            cache: get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: get("HF_HUB_OFFLINE").is_some_and(on),
            max_bytes,
            part: PART,
            clock,
        }
    }

    /// The same with ranges of this size; tests have small files.
    #[cfg(test)]
    pub(super) fn with_part(self, part: u64) -> Self {
        Self { part, ..self }
    }

    /// Makes sure that the checkpoint is in the cache. Blocks; `progress` gets bytes that are there and bytes in all.
    pub fn fetch(&self, path: &HubPath, progress: &mut dyn FnMut(u64, u64)) -> Result<Fetched, CheckpointError> {
        let fail = |problem: String| CheckpointError::new(path, problem);
        let repository = self.cache.join(format!("models--{}", path.repository().replace('/', "--")));
        if self.offline {
            return self.find(&repository, path).map_err(fail);
        }
        let agent = agent();
        let listing = self.list(&agent, path).map_err(fail)?;
        let commit = &listing.commit;
        let (total, blobs) = (listing.files.iter().map(|file| file.bytes).sum(), repository.join("blobs"));
        if total > self.max_bytes {
            let most = self.max_bytes;
            return Err(fail(format!("has {total} bytes, expected at most {most} (setting download.max_bytes)")));
        }
        std::fs::create_dir_all(&blobs).map_err(|error| fail(format!("{}: {error}", blobs.display())))?;
        self.download(&agent, path, &listing, &blobs, total, progress).map_err(fail)?;
        let folder = repository.join("snapshots").join(commit).join(path.subdir());
        for file in &listing.files {
            link(&blobs, &folder, path, file).map_err(|error| fail(format!("{}: {error}", folder.join(&file.name).display())))?;
        }
        let refs = repository.join("refs");
        write_whole(&refs, path.revision(), commit).map_err(|error| fail(format!("{}: {error}", refs.display())))?;
        Ok(Fetched { folder, origin: path.at(commit) })
    }

    fn list(&self, agent: &Agent, path: &HubPath) -> Result<Listing, String> {
        let url = format!("{}/api/models/{}/revision/{}?blobs=true", self.endpoint, path.repository(), path.revision());
        let json =
            get(agent, &url, self.token.as_deref(), &self.clock, MAX_LISTING_BYTES).map_err(|problem| format!("{url}: {problem}"))?;
        listing::parse(&json, path.subdir())
    }

    fn download(
        &self,
        agent: &Agent,
        path: &HubPath,
        listing: &Listing,
        blobs: &Path,
        total: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), String> {
        let (done, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        let token = self.token.as_deref();
        let downloader = Downloader { agent, token, clock: &self.clock, part: self.part, threads: THREADS, done: &done };
        let folder = if path.subdir().is_empty() { String::new() } else { format!("{}/", path.subdir()) };
        let url = |name: &str| format!("{}/{}/resolve/{}/{folder}{name}", self.endpoint, path.repository(), listing.commit);
        let teller = std::thread::current();
        let result = std::thread::scope(|scope| {
            let fetching = scope.spawn(|| {
                let result = downloader.fetch(blobs, &listing.files, &url);
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

    /// What an earlier download left.
    fn find(&self, repository: &Path, path: &HubPath) -> Result<Fetched, String> {
        let missing = |what: &str| format!("{what} is not in the cache {}, and HF_HUB_OFFLINE is set", self.cache.display());
        let commit = if is_hex(path.revision(), 40) {
            path.revision().to_owned()
        } else {
            let text = std::fs::read_to_string(repository.join("refs").join(path.revision()));
            text.ok().map(|text| text.trim().to_owned()).filter(|text| is_hex(text, 40)).ok_or_else(|| missing("this revision"))?
        };
        let folder = repository.join("snapshots").join(&commit).join(path.subdir());
        if !folder.is_dir() {
            return Err(missing("this folder"));
        }
        Ok(Fetched { folder, origin: path.at(&commit) })
    }
}

fn agent() -> Agent {
    Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .max_redirects(10)
        // The token is for the hub, not for whoever stores its files.
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .http_status_as_error(false)
        .user_agent(format!("warm/{}", crate::domain::VERSION))
        .build()
        .into()
}

fn read_token(file: &Path) -> Option<String> {
    let small = std::fs::metadata(file).is_ok_and(|found| found.is_file() && found.len() <= MAX_TOKEN_BYTES);
    small.then(|| std::fs::read_to_string(file).ok()).flatten().filter(|token| !token.trim().is_empty())
}

/// Gives a file of the cache its name in the snapshot.
fn link(blobs: &Path, folder: &Path, path: &HubPath, file: &RemoteFile) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let name = folder.join(&file.name);
    let depth = 2 + path.subdir().split('/').filter(|segment| !segment.is_empty()).count();
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

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
