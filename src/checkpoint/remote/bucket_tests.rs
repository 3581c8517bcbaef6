//! Against a server on this machine that speaks the routes of the stores, and misbehaves where a test wants it to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::checkpoint::remote::testing::{Answer, Asked, Server, part_of};

const PART: u64 = 10_000;

fn weights() -> Vec<u8> {
    (0..45_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// The objects of the bucket, each with its version.
fn objects(version: u64) -> Vec<(&'static str, Vec<u8>, String)> {
    let tag = |name: &str| format!("{name}-{version}");
    vec![
        ("rm/seed 0/config.json", b"{\"model_type\": \"qwen3\"}".to_vec(), tag("c")),
        ("rm/seed 0/model.safetensors", weights(), tag("w")),
        ("rm/seed 0/pytorch_model.bin", b"a pickle".to_vec(), tag("p")),
        ("rm/seed 0/tokenizer.json", b"{}".to_vec(), tag("t")),
        ("rm/seed 0/step-1/config.json", b"{}".to_vec(), tag("s")),
    ]
}

/// What a store in good health answers, in the dialect of its kind.
fn answer(store: Store, asked: &Asked, version: u64) -> Answer {
    answer_of(store, asked, objects(version))
}

fn answer_of(store: Store, asked: &Asked, objects: Vec<(&'static str, Vec<u8>, String)>) -> Answer {
    let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
    if query.contains("prefix=") {
        assert!(query.contains("prefix=rm%2Fseed%200%2F") || query.contains("prefix=rm%2Fseed+0%2F"), "{query}");
        let each = |(name, bytes, tag): (&str, Vec<u8>, String)| match store {
            Store::Azure => format!(
                "<Blob><Name>{name}</Name><Properties><Last-Modified>Tue, 24 Nov 2026 10:00:00 GMT</Last-Modified><Content-Length>{}</Content-Length>\
                 <Content-Type>x/y</Content-Type><Etag>{tag}</Etag></Properties></Blob>",
                bytes.len()
            ),
            Store::S3 | Store::Gcs => format!(
                "<Contents><Key>{name}</Key><LastModified>2026-11-24T10:00:00.000Z</LastModified><ETag>&quot;{tag}&quot;</ETag><Size>{}</Size></Contents>",
                bytes.len()
            ),
        };
        let all: String = objects.into_iter().map(each).collect();
        let xml = match store {
            Store::Azure => format!("<EnumerationResults><Blobs>{all}</Blobs><NextMarker/></EnumerationResults>"),
            Store::S3 | Store::Gcs => format!("<ListBucketResult>{all}</ListBucketResult>"),
        };
        return Answer::new(200, &[("content-type", "application/xml")], xml.as_bytes());
    }
    let name = decoded(path);
    let name = name.strip_prefix("/models/").unwrap_or_else(|| panic!("{name}"));
    match objects.into_iter().find(|(found, ..)| *found == name) {
        Some((_, bytes, tag)) => {
            let named = [("etag", format!("\"{tag}\"")), ("last-modified", "Tue, 24 Nov 2026 10:00:00 GMT".to_owned())];
            named.iter().fold(part_of(&bytes, asked), |answer, (name, value)| answer.with(name, value))
        }
        None => Answer::new(404, &[], b""),
    }
}

/// Some stores are asked for every character that is no letter by its number.
fn decoded(path: &str) -> String {
    let mut parts = path.split('%');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let (code, rest) = part.split_at(2);
        format!("{text}{}{rest}", char::from(u8::from_str_radix(code, 16).expect("a code")))
    })
}

fn buckets(server: &Server, home: &std::path::Path, more: &[(&str, &str)]) -> Buckets {
    let endpoint = format!("http://{}", server.address);
    let own = [
        ("HF_HOME", home.display().to_string()),
        ("AWS_ENDPOINT", endpoint.clone()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "very secret".to_owned()),
        ("AWS_PROFILE", "for other tools".to_owned()),
        ("GOOGLE_BASE_URL", endpoint.clone()),
        ("GOOGLE_SKIP_SIGNATURE", "true".to_owned()),
        ("GOOGLE_ALLOW_HTTP", "true".to_owned()),
        ("AZURE_ENDPOINT", endpoint),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account".to_owned()),
        ("AZURE_SKIP_SIGNATURE", "true".to_owned()),
        ("AZURE_ALLOW_HTTP", "true".to_owned()),
    ];
    let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
    let environment: Vec<_> = own.chain(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))).collect();
    let hub = Hub::from_environment(&environment, 1 << 30, Clock::manual());
    Buckets::beside(&hub, &environment).with_part(PART)
}

fn path(store: Store) -> BucketPath {
    format!("{}://models/rm/seed 0", store.scheme()).parse().expect("a path")
}

/// A server of S3's dialect whose answers may be replaced.
fn misbehaving(change: impl Fn(&Asked, Answer) -> Answer + Send + Sync + 'static) -> Server {
    Server::start(Arc::new(move |asked: &Asked| change(asked, answer(Store::S3, asked, 1))))
}

fn home() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
fn a_checkpoint_of_every_store_is_fetched_in_parts_once() {
    for store in [Store::S3, Store::Gcs, Store::Azure] {
        let server = Server::start(Arc::new(move |asked: &Asked| answer(store, asked, 1)));
        let (home, mut told) = (home(), Vec::new());
        let buckets = buckets(&server, home.path(), &[]);
        let folder = buckets.fetch(&path(store), &mut |done, total| told.push((done, total))).expect("fetched");
        let mut names: Vec<_> = std::fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"], "no pickle, and nothing of folders within");
        assert_eq!(std::fs::read(folder.join("model.safetensors")).expect("a file"), weights());
        assert_eq!(told.last().map(|told| told.0), told.last().map(|told| told.1));
        let parts = server.asked().iter().filter(|asked| decoded(&asked.path).ends_with("model.safetensors")).count();
        assert_eq!(parts, 5, "45000 bytes in parts of 10000");
        let before = server.asked().len();
        assert_eq!(buckets.fetch(&path(store), &mut |_, _| {}).expect("there"), folder);
        assert_eq!(server.asked().len(), before + 1, "listed, and nothing is fetched twice");
        // Without a network, the same.
        let offline = Buckets { offline: true, ..buckets };
        assert_eq!(offline.fetch(&path(store), &mut |_, _| {}).expect("cached"), folder);
        assert_eq!(server.asked().len(), before + 1);
        let other = format!("{}://models/other", store.scheme()).parse().expect("a path");
        assert!(offline.fetch(&other, &mut |_, _| {}).expect_err("not cached").to_string().contains("HF_HUB_OFFLINE"));
    }
}

#[test]
fn requests_are_signed_and_no_secret_is_shown() {
    let server = misbehaving(|_, answer| answer);
    let home = home();
    let buckets = buckets(&server, home.path(), &[]);
    buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect("fetched");
    let signed = |asked: &Asked| asked.token.as_deref().is_some_and(|token| token.starts_with("AWS4-HMAC-SHA256 Credential=key/"));
    assert!(server.asked().iter().all(signed), "{:?}", server.asked());
    assert!(!format!("{buckets:?}").contains("secret"));
}

#[test]
fn another_version_is_another_folder_and_the_old_one_stays() {
    let version = Arc::new(AtomicU64::new(1));
    let current = version.clone();
    let server = Server::start(Arc::new(move |asked: &Asked| answer(Store::S3, asked, current.load(Ordering::Relaxed))));
    let home = home();
    let buckets = buckets(&server, home.path(), &[]);
    let first = buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect("fetched");
    version.store(2, Ordering::Relaxed);
    let second = buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect("fetched");
    assert_ne!(first, second);
    assert!(first.join("model.safetensors").is_file() && second.join("model.safetensors").is_file());
}

#[test]
fn what_changes_while_it_is_read_never_gets_a_name() {
    let version = Arc::new(AtomicU64::new(1));
    let current = version.clone();
    let server = Server::start(Arc::new(move |asked: &Asked| {
        if asked.range.is_some_and(|(begin, _)| begin == 20_000) {
            current.store(2, Ordering::Relaxed);
        }
        answer(Store::S3, asked, current.load(Ordering::Relaxed))
    }));
    let home = home();
    let error = buckets(&server, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect_err("changed").to_string();
    assert!(error.contains("changed while it was read"), "{error}");
    let left = std::fs::read_dir(home.path().join("warm-buckets")).expect("a cache").next().expect("one").expect("entry").path();
    assert!(!left.join("snapshots").exists(), "no folder looks like a checkpoint");
}

#[test]
fn broken_connections_and_busy_servers_are_asked_again() {
    let busy = Mutex::new(2);
    let server = misbehaving(move |asked, answer| {
        let full = asked.range.is_some_and(|(begin, end)| end - begin + 1 == PART);
        let mut left = busy.lock().expect("no panic");
        if asked.path.contains("config.json") && *left > 0 {
            *left -= 1;
            return Answer::new(429, &[], b"");
        }
        if full { answer.broken_after(3_000) } else { answer }
    });
    let home = home();
    let folder = buckets(&server, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect("fetched");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).expect("a file"), weights());
}

#[test]
fn what_is_refused_says_what_to_do() {
    let home = home();
    for (status, words) in [(403, "variables AWS_..."), (404, "no such bucket")] {
        let server = misbehaving(move |_, _| Answer::new(status, &[], b"<Error><Code>No</Code></Error>"));
        let error = buckets(&server, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect_err("refused").to_string();
        assert!(error.contains(words) && error.contains("s3://models/rm/seed 0") && !error.contains("secret"), "{error}");
    }
    let empty = misbehaving(|_, _| Answer::new(200, &[], b"<ListBucketResult></ListBucketResult>"));
    let error = buckets(&empty, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect_err("nothing there").to_string();
    assert!(error.contains("config.json"), "{error}");
    let garbled = misbehaving(|_, _| Answer::new(200, &[], b"<ListBucketResult><Contents></Con"));
    assert!(buckets(&garbled, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).is_err());
}

#[test]
fn more_than_may_be_fetched_is_refused_before_a_byte_is() {
    let asked_for_bytes = Arc::new(AtomicBool::new(false));
    let seen = asked_for_bytes.clone();
    let server = misbehaving(move |asked, answer| {
        seen.fetch_or(asked.range.is_some(), Ordering::Relaxed);
        answer
    });
    let home = home();
    let small = Buckets { max_bytes: 1000, ..buckets(&server, home.path(), &[]) };
    let error = small.fetch(&path(Store::S3), &mut |_, _| {}).expect_err("too large").to_string();
    assert!(error.contains("45025") && error.contains("download.max_bytes"), "{error}");
    assert!(!asked_for_bytes.load(Ordering::Relaxed));
}

/// A bucket whose folder brings this list of checksums along.
fn with_checksums(list: &'static str, change: impl Fn(&Asked, Answer) -> Answer + Send + Sync + 'static) -> Server {
    Server::start(Arc::new(move |asked: &Asked| {
        let list = ("rm/seed 0/SHA256SUMS", list.as_bytes().to_vec(), "sums".to_owned());
        change(asked, answer_of(Store::S3, asked, objects(1).into_iter().chain([list]).collect()))
    }))
}

/// As `sha256sum config.json model.safetensors README.md` prints it; the last is not fetched.
fn sums() -> &'static str {
    let sum = |bytes: &[u8]| hex(digest(&SHA256, bytes).as_ref());
    let (config, weights) = (sum(b"{\"model_type\": \"qwen3\"}"), sum(&weights()));
    Box::leak(format!("{config}  config.json\n{weights}  model.safetensors\n{config}  README.md\n").into_boxed_str())
}

#[test]
fn one_wrong_byte_is_found_by_the_checksums_that_a_folder_brings_along() {
    let wrong = Arc::new(AtomicBool::new(true));
    let is_wrong = wrong.clone();
    let server = with_checksums(sums(), move |asked, mut answer| {
        if is_wrong.load(Ordering::Relaxed) && asked.range.is_some_and(|(begin, _)| begin == 20_000) {
            answer.body[5] ^= 1;
        }
        answer
    });
    let home = home();
    let buckets = buckets(&server, home.path(), &[]);
    let error = buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect_err("corrupt").to_string();
    assert!(error.contains("model.safetensors: expected checksum"), "{error}");
    let cache = std::fs::read_dir(home.path().join("warm-buckets")).expect("a cache").next().expect("one").expect("entry").path();
    assert!(!cache.join("snapshots").exists(), "no folder looks like a checkpoint");
    wrong.store(false, Ordering::Relaxed);
    let folder = buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect("the right bytes");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).expect("a file"), weights());
    assert!(!folder.join("SHA256SUMS").exists());
    assert!(cache.join("blobs").join(hex(digest(&SHA256, &weights()).as_ref())).is_file(), "named by its content");
}

#[test]
fn checksums_that_cannot_be_held_are_refused() {
    let missing = Box::leak(format!("{}{}  model-2.safetensors\n", sums(), "0".repeat(64)).into_boxed_str());
    for (list, words) in [(&*missing, "model-2.safetensors, which is not there"), ("<html>", "SHA256SUMS: line 1: expected a SHA-256")] {
        let (server, home) = (with_checksums(list, |_, answer| answer), home());
        let error = buckets(&server, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect_err("refused").to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_redirect_is_followed_without_the_signature() {
    let storage =
        Server::start(Arc::new(|asked: &Asked| part_of(&weights(), asked).with("last-modified", "Tue, 24 Nov 2026 10:00:00 GMT")));
    let elsewhere = storage.address.replace("127.0.0.1", "localhost");
    let server = misbehaving(move |asked, answer| {
        let moved = decoded(&asked.path).ends_with("model.safetensors") && asked.range.is_some();
        if moved { Answer::new(307, &[("location", &format!("http://{elsewhere}/moved"))], b"") } else { answer }
    });
    let home = home();
    let folder = buckets(&server, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect("fetched");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).expect("a file"), weights());
    let asked = storage.asked();
    assert!(asked.len() == 5 && asked.iter().all(|asked| asked.token.is_none() && asked.range.is_some()), "{asked:?}");
}

#[test]
fn wrong_lengths_are_not_believed() {
    for range in ["bytes 0-9999/12345", "bytes 7-10006/45000", "bytes 0-9999", ""] {
        let server = misbehaving(move |asked, answer| {
            let first = asked.range.is_some_and(|(begin, _)| begin == 0) && decoded(&asked.path).ends_with("model.safetensors");
            if !first {
                return answer;
            }
            let named = [("content-range", range), ("etag", "\"w-1\""), ("last-modified", "Tue, 24 Nov 2026 10:00:00 GMT")];
            Answer::new(206, &named, &answer.body)
        });
        let home = home();
        let error = buckets(&server, home.path(), &[]).fetch(&path(Store::S3), &mut |_, _| {}).expect_err(range).to_string();
        assert!(error.contains("model.safetensors"), "{range}: {error}");
    }
}

/// The parts of the weights that the cache says are whole; none where there is no such log.
fn whole_parts(home: &std::path::Path) -> Vec<u64> {
    let entries = |folder: PathBuf| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = entries(home.join("warm-buckets")).flat_map(|cache| entries(cache.join("blobs")));
    let logs = logs.filter(|path| path.extension().is_some_and(|ending| ending == "parts"));
    // Of the three files only this one has more than one part.
    let parts = logs.map(|log| std::fs::read_to_string(log).unwrap_or_default());
    parts.map(|text| text.lines().skip(1).filter_map(|part| part.parse().ok()).collect()).max_by_key(Vec::len).unwrap_or_default()
}

#[test]
fn a_download_goes_on_where_an_earlier_one_ended() {
    let (home, refusing) = (home(), Arc::new(AtomicBool::new(true)));
    let (refuses, place) = (refusing.clone(), home.path().to_owned());
    let server = misbehaving(move |asked, answer| {
        let last = asked.range.is_some_and(|(begin, _)| begin == 40_000);
        if !last || !refuses.load(Ordering::Relaxed) {
            return answer;
        }
        // Refused when all others are there, whichever order they come in.
        while whole_parts(&place).len() < 4 {
            std::thread::yield_now();
        }
        Answer::new(403, &[], b"")
    });
    let buckets = buckets(&server, home.path(), &[]);
    buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect_err("refused");
    refusing.store(false, Ordering::Relaxed);
    let before = server.asked().len();
    let folder = buckets.fetch(&path(Store::S3), &mut |_, _| {}).expect("the rest");
    let of_weights = |asked: &&Asked| decoded(&asked.path).ends_with("model.safetensors");
    let again: Vec<_> = server.asked()[before..].iter().filter(of_weights).filter_map(|asked| asked.range).collect();
    assert_eq!(again, [(40_000, 44_999)], "what was there is not asked for again");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).expect("a file"), weights());
}
