//! Checkpoints that lie elsewhere: on a hub (`hf:org/name@revision[/subdir]`), or in a bucket (`s3://`, `gs://` or `az://`,
//! the bucket's name and a folder in it) in the place of a folder. They are downloaded into a cache and read from there like
//! any folder.
//!
//! Nothing but safetensors, JSON and tokenizer files is fetched, so no code comes along. A revision becomes the commit that
//! it stands for, which is what is remembered. Nothing here is reachable over the wire: a path comes from the recipe alone.

mod bucket;
mod bucket_path;
mod cache;
mod download;
mod hub;
mod hub_path;
mod listing;
mod requests;
#[cfg(test)]
mod testing;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::CheckpointError;
use crate::clock::Clock;
use bucket::Buckets;
use bucket_path::{BucketPath, is_bucket};
use hub::Hub;
use hub_path::{HubPath, InvalidHubPath};
use listing::RemoteFile;

/// How a path on a hub begins.
const HUB: &str = "hf:";

/// Whether a member's path names a place elsewhere and not a folder.
pub fn is_remote(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(HUB) || is_bucket(path))
}

/// A path of a recipe, relative to the recipe's folder unless it lies elsewhere.
pub fn join(base: &Path, path: &str) -> PathBuf {
    if is_remote(Path::new(path)) { PathBuf::from(path) } else { base.join(path) }
}

/// Hubs and buckets, as the environment says they are reached, and where what they give is kept.
#[derive(Clone, Debug)]
pub struct Remotes {
    hub: Hub,
    buckets: Buckets,
}

/// A checkpoint that was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub folder: PathBuf,
    /// What the checkpoint is called from now on: on a hub with the commit that its revision stands for.
    pub origin: String,
}

impl Remotes {
    /// Whether a variable of the environment may say something of hubs, buckets, or where to keep files.
    pub fn is_variable(name: &str) -> bool {
        ["HF_", "AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix)) || name == "HOME" || name == "XDG_CACHE_HOME"
    }

    /// As other tools are told: `HF_ENDPOINT`, `HF_TOKEN` (or the file `HF_TOKEN_PATH`, `HF_HOME/token`), `HF_HUB_CACHE` or
    /// `HF_HOME`, `HF_HUB_OFFLINE`; `AWS_...`, `GOOGLE_...` and `AZURE_...` as the crate object_store reads them. At most
    /// `max_bytes` are fetched for one checkpoint.
    pub fn from_environment(environment: &[(String, String)], max_bytes: u64, clock: Clock) -> Self {
        let hub = Hub::from_environment(environment, max_bytes, clock);
        Self { buckets: Buckets::beside(&hub, environment), hub }
    }

    /// What the checkpoint at this place is called: [`Fetched::origin`], without fetching it.
    pub fn origin(&self, place: &str) -> Result<String, CheckpointError> {
        Ok(match Place::parse(place)? {
            Place::Bucket(path) => path.to_string(),
            Place::Hub(path) => self.hub.origin(&path)?.to_string(),
        })
    }

    /// Makes sure that the checkpoint is in the cache. Blocks; `progress` gets bytes that are there and bytes in all.
    pub fn fetch(&self, place: &str, progress: &mut dyn FnMut(u64, u64)) -> Result<Fetched, CheckpointError> {
        match Place::parse(place)? {
            Place::Bucket(path) => Ok(Fetched { folder: self.buckets.fetch(&path, progress)?, origin: path.to_string() }),
            Place::Hub(path) => {
                let fetched = self.hub.fetch(&path, progress)?;
                Ok(Fetched { folder: fetched.folder, origin: fetched.origin.to_string() })
            }
        }
    }
}

/// A place that was read.
enum Place {
    Hub(HubPath),
    Bucket(BucketPath),
}

impl Place {
    fn parse(place: &str) -> Result<Self, CheckpointError> {
        let wrong = |problem: &str| CheckpointError::new(place, problem);
        if is_bucket(place) {
            place.parse().map(Self::Bucket).map_err(|problem: String| wrong(&problem))
        } else {
            place.parse().map(Self::Hub).map_err(|invalid: InvalidHubPath| wrong(invalid.problem()))
        }
    }
}

/// Where the bytes of files come from.
trait Source: Sync {
    /// The bytes `begin..end` of a file, or fewer of them where the connection breaks.
    fn open<'s>(&'s self, file: &RemoteFile, begin: u64, end: u64) -> Result<Box<dyn Read + 's>, Trouble>;
}

/// Why a request did not give what was asked for, and whether asking again may.
enum Trouble {
    Passing { problem: String, wait: Option<Duration> },
    Final(String),
}

impl Trouble {
    fn passing(problem: String) -> Self {
        Self::Passing { problem, wait: None }
    }
}
