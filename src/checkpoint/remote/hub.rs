//! A hub and its cache on this machine, laid out as huggingface_hub does it, so that both find what the other has fetched:
//! `models--ORG--NAME/{blobs/DIGEST, refs/REVISION, snapshots/COMMIT/FILE}`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::Agent;
use ureq::config::RedirectAuthHeaders;

use super::HubPath;
use super::cache::{Repository, Room, room};
use super::listing::{self, Listing, is_hex};
use super::requests::{HubFiles, get};
use crate::checkpoint::CheckpointError;
use crate::clock::Clock;

/// Bytes of one range: large enough to be fast, small enough that a broken connection costs little.
pub(super) const PART: u64 = 64 << 20;
/// Names and sizes of a revision's files.
const MAX_LISTING_BYTES: u64 = 32 << 20;
/// A token is a line.
const MAX_TOKEN_BYTES: u64 = 4096;

/// Where models come from, and where they are kept.
#[derive(Clone)]
pub(super) struct Hub {
    endpoint: String,
    token: Option<String>,
    pub cache: PathBuf,
    pub offline: bool,
    /// Bytes of one checkpoint that may be fetched.
    pub max_bytes: u64,
    part: u64,
    pub room: Room,
    pub clock: Clock,
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
pub(super) struct Fetched {
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
            room,
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
        let repository = self.repository(path);
        if self.offline {
            return self.find(&repository, path).map_err(fail);
        }
        let agent = agent();
        let listing = self.list(&agent, path).map_err(fail)?;
        let commit = &listing.commit;
        let within = if path.subdir().is_empty() { String::new() } else { format!("{}/", path.subdir()) };
        let folder = format!("{}/{}/resolve/{commit}/{within}", self.endpoint, path.repository());
        let files = HubFiles { agent: &agent, token: self.token.as_deref(), folder };
        let Self { max_bytes, part, room, ref clock, .. } = *self;
        let repository = Repository { root: repository, max_bytes, part, room, clock: clock.clone() };
        let folder = repository.fetch(&files, &listing, path.subdir(), path.revision(), progress).map_err(fail)?;
        Ok(Fetched { folder, origin: path.at(commit) })
    }

    /// The place with the commit that its revision stands for now; offline, what it stood for when it was fetched.
    pub fn origin(&self, path: &HubPath) -> Result<HubPath, CheckpointError> {
        let origin = if is_hex(path.revision(), 40) {
            Ok(path.clone())
        } else if self.offline {
            self.find(&self.repository(path), path).map(|found| found.origin)
        } else {
            self.list(&agent(), path).map(|listing| path.at(&listing.commit))
        };
        origin.map_err(|problem| CheckpointError::new(path, problem))
    }

    /// Where a repository is kept.
    fn repository(&self, path: &HubPath) -> PathBuf {
        self.cache.join(format!("models--{}", path.repository().replace('/', "--")))
    }

    fn list(&self, agent: &Agent, path: &HubPath) -> Result<Listing, String> {
        let url = format!("{}/api/models/{}/revision/{}?blobs=true", self.endpoint, path.repository(), path.revision());
        let json =
            get(agent, &url, self.token.as_deref(), &self.clock, MAX_LISTING_BYTES).map_err(|problem| format!("{url}: {problem}"))?;
        listing::parse(&json, path.subdir())
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

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
