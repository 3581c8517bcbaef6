//! Against a server on this machine that speaks the hub's routes, and misbehaves where a test wants it to.

use std::sync::{Arc, Mutex};

use super::*;
use crate::checkpoint::remote::testing::{Answer, Asked, COMMIT, Repository, Server, part_of, sha256};

/// Small, so that a small file has many parts.
const PART: u64 = 10_000;

/// A repository with one checkpoint in the folder `seed-0`.
fn repository() -> Repository {
    let weights: Vec<u8> = (0..95_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let files: [(&str, &[u8]); 5] = [
        ("seed-0/config.json", b"{\"model_type\": \"qwen3\"}"),
        ("seed-0/tokenizer.json", b"{}"),
        ("seed-0/model.safetensors", &weights),
        ("seed-0/pytorch_model.bin", b"a pickle"),
        ("README.md", b"words"),
    ];
    Repository { name: "org/name".to_owned(), files: files.map(|(name, bytes)| (name.to_owned(), bytes.to_vec())).into() }
}

fn weights_of(repository: &Repository) -> &[u8] {
    &repository.files["seed-0/model.safetensors"]
}

fn hub(server: &Server, home: &Path, clock: &Clock) -> Hub {
    let environment = [
        ("HF_ENDPOINT", format!("http://{}/", server.address)),
        ("HF_HOME", home.display().to_string()),
        ("HF_TOKEN", "hf_secret".to_owned()),
    ];
    let environment: Vec<_> = environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Hub::from_environment(&environment, 1 << 30, clock.clone()).with_part(PART)
}

fn path() -> HubPath {
    "hf:org/name@v1/seed-0".parse().expect("a path")
}

fn home() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A server of this repository whose answers may be replaced.
fn misbehaving(change: impl Fn(&Asked, Answer) -> Answer + Send + Sync + 'static) -> (Repository, Server) {
    let repository = repository();
    let own = repository.clone();
    let server = Server::start(Arc::new(move |asked: &Asked| change(asked, own.answer(asked))));
    (repository, server)
}

#[test]
fn a_checkpoint_is_fetched_in_parts_once_and_named_by_its_commit() {
    let (repository, server) = misbehaving(|_, answer| answer);
    let (home, clock) = (home(), Clock::manual());
    let mut told = Vec::new();
    let fetched = hub(&server, home.path(), &clock).fetch(&path(), &mut |done, total| told.push((done, total))).expect("fetched");
    assert_eq!(fetched.origin.to_string(), format!("hf:org/name@{COMMIT}/seed-0"));
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let bytes = std::fs::read(fetched.folder.join(name)).expect("a file");
        assert_eq!(bytes, repository.files[&format!("seed-0/{name}")], "{name}");
    }
    assert_eq!(std::fs::read_dir(&fetched.folder).expect("a folder").count(), 3, "no pickle, and nothing of other folders");
    let total = told.last().expect("told").1;
    assert_eq!(told.last(), Some(&(total, total)));
    assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{told:?}");
    let ranges = server.downloads().iter().filter(|asked| asked.path.ends_with("model.safetensors")).count();
    assert_eq!(ranges, 10, "95000 bytes in parts of 10000");
    assert!(server.asked().iter().all(|asked| asked.token.as_deref() == Some("Bearer hf_secret")));
    // The layout of other tools: a link into the blobs, and the commit of the revision.
    let base = home.path().join("hub/models--org--name");
    assert_eq!(std::fs::read_to_string(base.join("refs/v1")).expect("a ref"), COMMIT);
    let left: Vec<_> = std::fs::read_dir(base.join("blobs")).expect("blobs").map(|entry| entry.expect("entry").file_name()).collect();
    assert_eq!(left.len(), 3, "nothing but whole files: {left:?}");

    let before = server.downloads().len();
    let again = hub(&server, home.path(), &clock).fetch(&path(), &mut |_, _| {}).expect("there");
    assert_eq!((again, server.downloads().len()), (fetched.clone(), before), "nothing is fetched twice");
    // Without a network, the same.
    let offline = Hub { offline: true, ..hub(&server, home.path(), &clock) };
    let asked = server.asked().len();
    assert_eq!(offline.fetch(&path(), &mut |_, _| {}).expect("cached"), fetched);
    assert_eq!(server.asked().len(), asked);
    let other: HubPath = "hf:org/name@v2/seed-0".parse().expect("a path");
    assert!(offline.fetch(&other, &mut |_, _| {}).expect_err("not cached").to_string().contains("HF_HUB_OFFLINE"));
}

#[test]
fn the_token_does_not_follow_a_redirect_to_another_host() {
    let repository = repository();
    let files = repository.clone();
    let storage = Server::start(Arc::new(move |asked: &Asked| part_of(weights_of(&files), asked)));
    let elsewhere = storage.address.replace("127.0.0.1", "localhost");
    let (_, server) = misbehaving(move |asked, answer| {
        if asked.path.ends_with("model.safetensors") {
            return Answer::new(302, &[("location", &format!("http://{elsewhere}/signed?x=1"))], b"");
        }
        answer
    });
    let home = home();
    let fetched = hub(&server, home.path(), &Clock::manual()).fetch(&path(), &mut |_, _| {}).expect("fetched");
    assert_eq!(std::fs::read(fetched.folder.join("model.safetensors")).expect("a file"), weights_of(&repository));
    let asked = storage.asked();
    assert!(asked.len() == 10 && asked.iter().all(|asked| asked.token.is_none() && asked.range.is_some()), "{asked:?}");
}

#[test]
fn a_server_that_is_too_busy_is_asked_again_when_it_says() {
    let refusals = Mutex::new(3);
    let (_, server) = misbehaving(move |asked, answer| {
        let mut left = refusals.lock().expect("no panic");
        if asked.path.ends_with("config.json") && *left > 0 {
            *left -= 1;
            return Answer::new(429, &[("retry-after", "17")], b"");
        }
        answer
    });
    let (home, clock) = (home(), Clock::manual());
    let start = clock.now();
    hub(&server, home.path(), &clock).fetch(&path(), &mut |_, _| {}).expect("fetched");
    assert_eq!(clock.now() - start, Duration::from_secs(51));
}

#[test]
fn a_server_that_stays_broken_is_given_up() {
    let (_, server) = misbehaving(|asked, answer| if asked.path.ends_with("config.json") { Answer::new(503, &[], b"") } else { answer });
    let (home, clock) = (home(), Clock::manual());
    let error = hub(&server, home.path(), &clock).fetch(&path(), &mut |_, _| {}).expect_err("broken").to_string();
    assert!(error.contains("config.json") && error.contains("503") && error.contains("hf:org/name@v1/seed-0"), "{error}");
    let attempts = server.downloads().iter().filter(|asked| asked.path.ends_with("config.json")).count();
    assert_eq!(attempts, 7);
}

#[test]
fn a_broken_connection_goes_on_where_it_broke() {
    let (repository, server) = misbehaving(|asked, answer| {
        let full = asked.range.is_some_and(|(begin, end)| end - begin + 1 == PART);
        if full { answer.broken_after(3_000) } else { answer }
    });
    let home = home();
    let fetched = hub(&server, home.path(), &Clock::manual()).fetch(&path(), &mut |_, _| {}).expect("fetched");
    assert_eq!(std::fs::read(fetched.folder.join("model.safetensors")).expect("a file"), weights_of(&repository));
    let begins: Vec<u64> = server.downloads().iter().filter_map(|asked| Some(asked.range?.0)).collect();
    assert!(begins.contains(&3_000) && begins.contains(&43_000), "{begins:?}");
}

#[test]
fn wrong_lengths_are_not_believed() {
    for (wrong, words) in [("bytes 0-9999/12345", "12345"), ("bytes 7-9999/95000", "bytes 7-9999"), ("", "content-range")] {
        let (_, server) = misbehaving(move |asked, answer| {
            if asked.path.ends_with("model.safetensors") && asked.range.is_some_and(|(begin, _)| begin == 0) {
                let body = answer.body.clone();
                return Answer::new(206, &[("content-range", wrong)], &body);
            }
            answer
        });
        let home = home();
        let error = hub(&server, home.path(), &Clock::manual()).fetch(&path(), &mut |_, _| {}).expect_err("wrong").to_string();
        assert!(error.contains(words), "{error}");
    }
    // A server without ranges may send a small file whole, if it is as long as it was said to be.
    let (_, server) = misbehaving(|asked, _| {
        let repository = repository();
        let whole = Asked { range: None, ..asked.clone() };
        if asked.path.ends_with("config.json") { Answer::new(200, &[], b"{}") } else { repository.answer(&whole) }
    });
    let home = home();
    let error = hub(&server, home.path(), &Clock::manual()).fetch(&path(), &mut |_, _| {}).expect_err("wrong").to_string();
    assert!(error.contains("expected 23 bytes, the server has 2") || error.contains("part of a file"), "{error}");
}

#[test]
fn other_bytes_than_promised_never_get_a_name() {
    let wrong = Arc::new(Mutex::new(true));
    let is_wrong = wrong.clone();
    let (_, server) = misbehaving(move |asked, mut answer| {
        if *is_wrong.lock().expect("no panic") && asked.range.is_some_and(|(begin, _)| begin == 20_000) {
            answer.body[5] ^= 1;
        }
        answer
    });
    let home = home();
    let hub = hub(&server, home.path(), &Clock::manual());
    let error = hub.fetch(&path(), &mut |_, _| {}).expect_err("corrupt").to_string();
    assert!(error.contains("checksum"), "{error}");
    let snapshots = home.path().join("hub/models--org--name/snapshots");
    assert!(!snapshots.exists(), "no folder looks like a checkpoint");
    *wrong.lock().expect("no panic") = false;
    hub.fetch(&path(), &mut |_, _| {}).expect("the next attempt begins anew");
}

#[test]
fn what_was_fetched_before_a_failure_is_not_fetched_again() {
    let broken = Arc::new(Mutex::new(true));
    let is_broken = broken.clone();
    let (repository, server) = misbehaving(move |asked, answer| {
        let late = asked.range.is_some_and(|(begin, _)| begin >= 50_000);
        if late && *is_broken.lock().expect("no panic") { Answer::new(410, &[], b"") } else { answer }
    });
    let home = home();
    let hub = hub(&server, home.path(), &Clock::manual());
    assert!(hub.fetch(&path(), &mut |_, _| {}).is_err());
    let first: Vec<_> = whole_parts(home.path());
    *broken.lock().expect("no panic") = false;
    let before = server.downloads().len();
    let fetched = hub.fetch(&path(), &mut |_, _| {}).expect("the rest");
    let weights = |asked: &&Asked| asked.path.ends_with("model.safetensors");
    let second: Vec<u64> = server.downloads()[before..].iter().filter(weights).filter_map(|asked| Some(asked.range?.0 / PART)).collect();
    assert!(!first.is_empty() && first.iter().all(|part| !second.contains(part)), "{first:?}, then {second:?}");
    assert_eq!(std::fs::read(fetched.folder.join("model.safetensors")).expect("a file"), weights_of(&repository));
}

/// Parts of the weights that the cache says are whole.
fn whole_parts(home: &Path) -> Vec<u64> {
    let blobs = home.join("hub/models--org--name/blobs");
    let log = std::fs::read_to_string(blobs.join(format!("{}.parts", sha256(weights_of(&repository()))))).expect("a log");
    log.lines().skip(1).map(|line| line.parse().expect("a number")).collect()
}

#[test]
fn what_is_refused_says_what_to_do() {
    for (status, words) in [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "no such repository")] {
        let (_, server) = misbehaving(move |_, _| Answer::new(status, &[], b""));
        let home = home();
        let error = hub(&server, home.path(), &Clock::manual()).fetch(&path(), &mut |_, _| {}).expect_err("refused").to_string();
        assert!(error.contains(words) && !error.contains("hf_secret"), "{error}");
        assert_eq!(server.asked().len(), 1, "asking again would not help");
    }
}

#[test]
fn more_than_may_be_fetched_is_refused_before_a_byte_is() {
    let (_, server) = misbehaving(|_, answer| answer);
    let home = home();
    let small = Hub { max_bytes: 1000, ..hub(&server, home.path(), &Clock::manual()) };
    let error = small.fetch(&path(), &mut |_, _| {}).expect_err("too large").to_string();
    assert!(error.contains("95025") && error.contains("download.max_bytes"), "{error}");
    assert!(server.downloads().is_empty());
    assert!(!home.path().join("hub").exists());
}

#[test]
fn more_than_the_volume_has_room_for_is_refused_before_a_byte_is_asked_for() {
    let late = Arc::new(Mutex::new(true));
    let is_broken = late.clone();
    let (_, server) = misbehaving(move |asked, answer| {
        let last = asked.range.is_some_and(|(begin, _)| begin >= 90_000);
        if last && *is_broken.lock().expect("no panic") { Answer::new(410, &[], b"") } else { answer }
    });
    let home = home();
    let with = |room| Hub { room, ..hub(&server, home.path(), &Clock::manual()) };
    let error = with(|_| Some(95_024)).fetch(&path(), &mut |_, _| {}).expect_err("no room").to_string();
    assert!(error.contains("needs 95025 more bytes") && error.contains("has 95024 left"), "{error}");
    assert!(server.downloads().is_empty());
    with(|_| Some(95_025)).fetch(&path(), &mut |_, _| {}).expect_err("the last part is refused");
    *late.lock().expect("no panic") = false;
    // What was begun has its room already; where nobody says how much there is, it is tried.
    with(|_| None).fetch(&path(), &mut |_, _| {}).expect("fetched");
    with(|_| Some(0)).fetch(&path(), &mut |_, _| {}).expect("nothing is needed");
    #[cfg(target_os = "linux")]
    assert!(room(home.path()).is_some_and(|room| room > 0));
}

#[test]
fn two_processes_at_once_fetch_it_once() {
    let (repository, server) = misbehaving(|_, answer| answer);
    let home = home();
    let hubs = [hub(&server, home.path(), &Clock::manual()), hub(&server, home.path(), &Clock::manual())];
    let fetched: Vec<Fetched> = std::thread::scope(|scope| {
        let threads: Vec<_> = hubs.iter().map(|hub| scope.spawn(|| hub.fetch(&path(), &mut |_, _| {}).expect("fetched"))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(fetched[0], fetched[1]);
    assert_eq!(std::fs::read(fetched[0].folder.join("model.safetensors")).expect("a file"), weights_of(&repository));
    let weights = server.downloads().iter().filter(|asked| asked.path.ends_with("model.safetensors")).count();
    assert_eq!(weights, 10, "each part once");
}

/// On a volume without locks another process may have the same file in hand, and be done first.
#[test]
fn a_file_that_another_process_has_finished_meanwhile_is_taken_if_it_is_whole() {
    let (whole, cut) = (weights_of(&repository()).to_vec(), weights_of(&repository())[..90_000].to_vec());
    let corrupt: Vec<u8> = whole.iter().enumerate().map(|(i, byte)| byte ^ u8::from(i == 7)).collect();
    for (left, taken) in [(Some(&whole), true), (Some(&cut), false), (Some(&corrupt), false), (None, false)] {
        let (home, left) = (home(), left.cloned());
        let place = home.path().join("hub/models--org--name/blobs").join(sha256(&whole));
        let (_, server) = misbehaving(move |asked, answer| {
            if asked.path.ends_with("model.safetensors") && asked.range.is_some_and(|(begin, _)| begin == 90_000) {
                let beside = |suffix: &str| PathBuf::from(format!("{}.{suffix}", place.display()));
                ["incomplete", "parts", "lock"].iter().for_each(|suffix| std::fs::remove_file(beside(suffix)).expect("there"));
                left.iter().for_each(|bytes| std::fs::write(&place, bytes).expect("written"));
            }
            answer
        });
        let fetched = hub(&server, home.path(), &Clock::manual()).fetch(&path(), &mut |_, _| {});
        assert_eq!(fetched.is_ok(), taken, "{fetched:?}");
        if let Ok(fetched) = fetched {
            assert_eq!(std::fs::read(fetched.folder.join("model.safetensors")).expect("a file"), whole);
        }
    }
}

#[test]
fn settings_come_from_the_variables_of_other_tools() {
    let hub = |pairs: &[(&str, &str)]| {
        let pairs: Vec<_> = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Hub::from_environment(&pairs, 1, Clock::manual())
    };
    let plain = hub(&[("HOME", "/h")]);
    assert_eq!(
        (plain.endpoint.as_str(), plain.cache.as_path(), plain.offline),
        ("https://huggingface.co", Path::new("/h/.cache/huggingface/hub"), false)
    );
    let home = home();
    std::fs::write(home.path().join("token"), "hf_file\n").expect("written");
    let named = hub(&[("HF_HOME", home.path().to_str().expect("UTF-8")), ("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://mirror/")]);
    assert_eq!((named.token.as_deref(), named.offline, named.endpoint.as_str()), (Some("hf_file"), true, "http://mirror"));
    assert_eq!(hub(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]).cache, Path::new("/c"));
}
