//! Buckets of object stores, through the crate object_store: listed, read by ranges, and kept as a hub's files are. What a
//! store says of a file's version names it in the cache; a file that changes while it is read is an error.
//!
//! Of a file's content no store says anything that can be relied on (an ETag is an MD5 only of an object that came in one
//! part and is not encrypted with a customer's key, and does not say whether it is). So whoever writes the folder may put a
//! `SHA256SUMS` beside the files, as `sha256sum *` prints it; what it names is held to it, and named by it in the cache.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Once;

use bytes::Bytes;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore};
use ring::digest::{SHA256, digest};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_stream::{Stream, StreamExt};

use super::bucket_path::{BucketPath, Store};
use super::cache::{Repository, Room};
use super::download::hex;
use super::hub::{Hub, PART};
use super::hub_path::is_segment;
use super::listing::{Digest, Listing, RemoteFile, check, checksums, is_wanted};
use super::{Source, Trouble};
use crate::checkpoint::CheckpointError;
use crate::clock::Clock;

/// A folder of a checkpoint has far fewer files, those of its subfolders included.
const MAX_FILES: usize = 10_000;
/// The checksums that a folder brings along.
const CHECKSUMS: &str = "SHA256SUMS";
/// It has a line for each file.
const MAX_CHECKSUMS_BYTES: usize = 1 << 20;
/// For one range; a range that breaks is gone on with.
const TIMEOUT: &str = "10 minutes";

/// How buckets are reached, and where what lies in them is kept.
#[derive(Clone)]
pub(super) struct Buckets {
    /// Of the environment; some are secrets.
    variables: Vec<(String, String)>,
    cache: PathBuf,
    offline: bool,
    max_bytes: u64,
    part: u64,
    room: Room,
    clock: Clock,
}

impl fmt::Debug for Buckets {
    /// Without the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buckets").field("cache", &self.cache).field("offline", &self.offline).finish_non_exhaustive()
    }
}

impl Buckets {
    /// Kept beside what comes from the hub, and as offline as it.
    pub fn beside(hub: &Hub, environment: &[(String, String)]) -> Self {
        let Hub { cache, offline, max_bytes, room, clock, .. } = hub;
        let variables = environment.iter().filter(|(name, _)| name.contains('_')).cloned().collect();
        let (cache, clock) = (cache.with_file_name("warm-buckets"), clock.clone());
        Self { variables, cache, offline: *offline, max_bytes: *max_bytes, part: PART, room: *room, clock }
    }

    /// The same with ranges of this size; tests have small files.
    #[cfg(test)]
    pub fn with_part(self, part: u64) -> Self {
        Self { part, ..self }
    }

    /// Makes sure that the checkpoint is in the cache, and gives its folder there.
    pub fn fetch(&self, path: &BucketPath, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf, CheckpointError> {
        let fail = |problem: String| CheckpointError::new(path, problem);
        let folder = hex(&digest(&SHA256, path.folder.as_bytes()).as_ref()[..8]);
        let root = self.cache.join(format!("{}--{}--{folder}", path.store.scheme(), path.bucket));
        let Self { max_bytes, part, room, ref clock, .. } = *self;
        let repository = Repository { root, max_bytes, part, room, clock: clock.clone() };
        if self.offline {
            let missing = || fail(format!("is not in the cache {}, and HF_HUB_OFFLINE is set", self.cache.display()));
            let version = std::fs::read_to_string(repository.root.join("refs/latest")).map_err(|_| missing())?;
            let found = repository.snapshot(version.trim(), "");
            return if found.is_dir() { Ok(found) } else { Err(missing()) };
        }
        let (_runtime, handle) = OwnRuntime::new().map_err(|error| fail(error.to_string()))?;
        let store = self.store(path).map_err(|error| fail(plain(&error)))?;
        // On a thread of its own, because the caller's may belong to a runtime.
        let listing = || handle.block_on(list(&*store, path));
        let listed = std::thread::scope(|scope| scope.spawn(listing).join().unwrap_or_else(|_| Err("the listing panicked".to_owned())));
        let (listing, objects) = listed.map_err(fail)?;
        let files = BucketFiles { store, handle, kind: path.store, objects };
        repository.fetch(&files, &listing, "", "latest", progress).map_err(fail)
    }

    /// The bucket, as the variables of its kind say.
    fn store(&self, path: &BucketPath) -> Result<Box<dyn ObjectStore>, Error> {
        with_provider();
        let own = |(name, _): &&(String, String)| name.starts_with(path.store.variables());
        let variables = self.variables.iter().filter(own).map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
        let options = std::iter::once(("timeout".to_owned(), TIMEOUT.to_owned())).chain(variables);
        // A variable that the crate does not know is for other tools.
        macro_rules! build {
            ($builder:expr) => {{
                let known = options.filter_map(|(name, value)| Some((name.parse().ok()?, value)));
                Box::new(known.fold($builder, |builder, (key, value)| builder.with_config(key, value)).build()?)
            }};
        }
        Ok(match path.store {
            Store::S3 => build!(AmazonS3Builder::new().with_bucket_name(&path.bucket)),
            Store::Gcs => build!(GoogleCloudStorageBuilder::new().with_bucket_name(&path.bucket)),
            Store::Azure => build!(MicrosoftAzureBuilder::new().with_container_name(&path.bucket)),
        })
    }
}

/// The connections' own threads. Left to end by itself, because the last one who has it may itself be a runtime's thread.
struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    fn new() -> io::Result<(Self, Handle)> {
        let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("warm-download").enable_all().build()?;
        let handle = runtime.handle().clone();
        Ok((Self(Some(runtime)), handle))
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// TLS by ring, as everywhere here; whoever was faster has chosen the same.
fn with_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

/// The files of one folder, each in the version that was listed.
struct BucketFiles {
    store: Box<dyn ObjectStore>,
    handle: Handle,
    kind: Store,
    objects: BTreeMap<String, ObjectMeta>,
}

/// What a checkpoint needs of a folder, and what the store says of each file.
async fn list(store: &dyn ObjectStore, path: &BucketPath) -> Result<(Listing, BTreeMap<String, ObjectMeta>), String> {
    let prefix = Path::parse(&path.folder).map_err(|error| error.to_string())?;
    let mut objects = BTreeMap::new();
    let mut found = store.list(Some(&prefix));
    let (mut seen, mut listed) = (0, None);
    while let Some(object) = found.next().await {
        let object = object.map_err(|error| words(path.store, &error))?;
        seen += 1;
        if seen > MAX_FILES {
            return Err(format!("holds more than {MAX_FILES} objects, so it is no checkpoint's own folder"));
        }
        let within: Vec<_> = object.location.prefix_match(&prefix).into_iter().flatten().collect();
        // Not what lies in folders within.
        let [name] = &within[..] else { continue };
        let name = name.as_ref().to_owned();
        if name == CHECKSUMS {
            listed = Some(object);
        } else if is_segment(&name) && is_wanted(&name) {
            objects.insert(name, object);
        }
    }
    let mut sums = match listed {
        None => BTreeMap::new(),
        Some(object) => read_checksums(store, path.store, &object).await.map_err(|problem| format!("{CHECKSUMS}: {problem}"))?,
    };
    let file = |(name, object): (&String, &ObjectMeta)| {
        let stated = || format!("{}\n{}\n{}", object.location, object.size, version(object));
        let digest = match sums.remove(name) {
            Some(sum) => Digest::Sha256(sum),
            None => Digest::Version(hex(digest(&SHA256, stated().as_bytes()).as_ref())),
        };
        RemoteFile { name: name.clone(), bytes: object.size, digest }
    };
    let files: Vec<RemoteFile> = objects.iter().map(file).collect();
    check(&files)?;
    if let Some(missing) = sums.keys().find(|name| is_wanted(name)) {
        return Err(format!("{CHECKSUMS} names {missing}, which is not there"));
    }
    let all: String = files.iter().map(|file| format!("{} {}\n", file.name, file.digest.hex())).collect();
    Ok((Listing { commit: hex(&digest(&SHA256, all.as_bytes()).as_ref()[..20]), files }, objects))
}

async fn read_checksums(store: &dyn ObjectStore, kind: Store, object: &ObjectMeta) -> Result<BTreeMap<String, String>, String> {
    let refuse = |error: Error| words(kind, &error);
    let mut body = store.get_opts(&object.location, GetOptions::default()).await.map_err(refuse)?.into_stream();
    let mut text = Vec::new();
    while let Some(chunk) = body.next().await {
        text.extend_from_slice(&chunk.map_err(refuse)?);
        if text.len() > MAX_CHECKSUMS_BYTES {
            return Err(format!("has more than {MAX_CHECKSUMS_BYTES} bytes"));
        }
    }
    checksums(std::str::from_utf8(&text).map_err(|error| error.to_string())?)
}

/// What went wrong, and what can be done.
fn words(store: Store, error: &Error) -> String {
    let words = plain(error);
    // A listing that is refused has no kind of its own, but says the status.
    let says = |status: &str| words.contains(&format!("code: {status} "));
    if matches!(error, Error::NotFound { .. }) || says("404") {
        format!("there is no such bucket or object, or only for others: {words}")
    } else if matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) || says("401") || says("403") {
        format!("this needs credentials that may list and read it (variables {}...): {words}", store.variables())
    } else {
        words
    }
}

impl Source for BucketFiles {
    fn open<'s>(&'s self, file: &RemoteFile, begin: u64, end: u64) -> Result<Box<dyn Read + 's>, Trouble> {
        let listed = self.objects.get(&file.name).ok_or_else(|| Trouble::Final("was not listed".to_owned()))?;
        let handle = &self.handle;
        let options = GetOptions { range: Some(GetRange::Bounded(begin..end)), ..GetOptions::default() };
        let found: GetResult = handle.block_on(self.store.get_opts(&listed.location, options)).map_err(|error| match error {
            Error::NotFound { .. } | Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                Trouble::Final(words(self.kind, &error))
            }
            other => Trouble::passing(plain(&other)),
        })?;
        let stated = |object: &ObjectMeta| object.e_tag.as_deref().map(|tag| tag.trim_matches('"').to_owned());
        let changed = stated(&found.meta).zip(stated(listed)).is_some_and(|(now, then)| now != then);
        if changed || found.meta.size != file.bytes {
            return Err(Trouble::Final("was changed while it was read".to_owned()));
        }
        Ok(Box::new(Body { handle, stream: found.into_stream(), chunk: Bytes::new() }))
    }
}

/// What tells one version of an object from another.
fn version(object: &ObjectMeta) -> String {
    let named = object.e_tag.as_deref().or(object.version.as_deref());
    named.map_or_else(|| object.last_modified.to_rfc3339(), |tag| tag.trim_matches('"').to_owned())
}

/// The crate's sentence with all that it was caused by, short enough for a log.
fn plain(error: &Error) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = inner.source();
    }
    words.chars().take(500).collect()
}

/// A body that is waited for.
struct Body<'a, S> {
    handle: &'a Handle,
    stream: S,
    chunk: Bytes,
}

impl<S: Stream<Item = object_store::Result<Bytes>> + Unpin> Read for Body<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.handle.block_on(self.stream.next()) {
                None => return Ok(0),
                Some(chunk) => self.chunk = chunk.map_err(io::Error::other)?,
            }
        }
        let count = into.len().min(self.chunk.len());
        into[..count].copy_from_slice(&self.chunk.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
#[path = "bucket_tests.rs"]
mod tests;
