//! Watching files by looking at them: what is there, how long it has been like this, and whether that is a reason to
//! reload.
//!
//! Looking works everywhere that names lead to files: on network volumes, which send no events for what other machines
//! write, and in Kubernetes, where a ConfigMap changes by the swap of a symbolic link above the file. Names are followed to
//! the end, so such a swap shows as another inode. A stamp is size, times and inode; contents are for the reload to hash.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use crate::clock::Clock;
use crate::config::WatchConfig;
use crate::scorer::stand_last;

/// Entries of one folder that are looked at, at most.
const MAX_ENTRIES: usize = 10_000;

/// What a file looks like from outside; `None` for one that is not there or cannot be looked at.
type FileStamp = Option<(u64, Option<SystemTime>, (u64, i64, i64))>;

/// What all watched files look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp(BTreeMap<PathBuf, FileStamp>);

/// What is watched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watched {
    pub files: Vec<PathBuf>,
    /// Checkpoint folders: all files in them, and the marker of a complete one.
    pub folders: Vec<PathBuf>,
}

/// Looks at everything; false beside the stamp if a folder has no marker.
pub(super) fn look(watched: &Watched, marker: Option<&str>) -> (Stamp, bool) {
    let mut stamp = Stamp::default();
    for file in &watched.files {
        stamp.0.insert(file.clone(), look_at(file));
    }
    let mut complete = true;
    for folder in &watched.folders {
        // A folder that is replaced by another shows as another inode.
        stamp.0.insert(folder.clone(), look_at(folder));
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_ENTRIES);
        stamp.0.extend(entries.map(|entry| entry.path()).map(|path| (path.clone(), look_at(&path))));
        complete &= marker.is_none_or(|marker| folder.join(marker).exists());
    }
    (stamp, complete)
}

fn look_at(path: &Path) -> FileStamp {
    let found = std::fs::metadata(path).ok()?;
    Some((found.len(), found.modified().ok(), identity(&found)))
}

#[cfg(unix)]
fn identity(found: &std::fs::Metadata) -> (u64, i64, i64) {
    use std::os::unix::fs::MetadataExt;
    (found.ino(), found.ctime(), found.ctime_nsec())
}

#[cfg(not(unix))]
fn identity(_: &std::fs::Metadata) -> (u64, i64, i64) {
    (0, 0, 0)
}

/// Decides when a change counts: when it is complete, and nothing has moved for a while. Pure.
#[derive(Debug)]
pub(super) struct Settle {
    wait: Duration,
    /// What the last reload, or the start, was about.
    acted: Stamp,
    seen: Stamp,
    since: Instant,
}

impl Settle {
    pub fn new(wait: Duration, now: Instant, found: Stamp) -> Self {
        Self { wait, acted: found.clone(), seen: found, since: now }
    }

    /// Whether there is a change that has settled; it is told once.
    pub fn observe(&mut self, now: Instant, found: Stamp, complete: bool) -> bool {
        if found != self.seen {
            (self.seen, self.since) = (found, now);
        }
        let settled = now.saturating_duration_since(self.since) >= self.wait;
        if !settled || !complete || self.seen == self.acted {
            return false;
        }
        self.acted = self.seen.clone();
        true
    }
}

/// Looks at files on a thread of its own until it is dropped.
#[derive(Debug)]
pub struct FileWatch {
    _stop: Sender<()>,
}

impl FileWatch {
    /// `watched` is asked anew each time, because a changed recipe names other folders; `changed` is called for every
    /// change that has settled.
    pub(super) fn start(
        options: WatchConfig,
        clock: Clock,
        watched: impl Fn() -> Watched + Send + 'static,
        changed: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        // Before the thread runs, so that no change after this call is taken for the beginning.
        let (found, _) = look(&watched(), options.marker.as_deref());
        let mut settle = Settle::new(options.settle, clock.now(), found);
        let run = move || {
            stand_last();
            while waits(&stopped, options.interval) {
                let (found, complete) = look(&watched(), options.marker.as_deref());
                if settle.observe(clock.now(), found, complete) {
                    tracing::info!("files have changed");
                    changed();
                }
            }
        };
        std::thread::Builder::new().name("warm-watch".to_owned()).spawn(run)?;
        Ok(Self { _stop: stop })
    }
}

/// Waits for the next look; false if there is none.
fn waits(stopped: &Receiver<()>, interval: Duration) -> bool {
    matches!(stopped.recv_timeout(interval), Err(RecvTimeoutError::Timeout))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stamp(sizes: &[u64]) -> Stamp {
        Stamp(sizes.iter().enumerate().map(|(i, size)| (PathBuf::from(i.to_string()), Some((*size, None, (0, 0, 0))))).collect())
    }

    const WAIT: Duration = Duration::from_secs(10);

    #[test]
    fn a_change_counts_once_and_only_when_it_has_settled() {
        let start = Clock::manual().now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut settle = Settle::new(WAIT, start, stamp(&[1]));
        assert!(!settle.observe(at(60), stamp(&[1]), true), "nothing has changed");
        // A copy that grows is not read.
        for (second, size) in [(62, 2), (64, 3), (66, 4), (75, 4)] {
            assert!(!settle.observe(at(second), stamp(&[size]), true), "at {second} s");
        }
        assert!(settle.observe(at(76), stamp(&[4]), true));
        assert!(!settle.observe(at(90), stamp(&[4]), true), "told already");
        assert!(!settle.observe(at(91), stamp(&[1]), true));
        assert!(settle.observe(at(101), stamp(&[1]), true), "back to the beginning is a change as well");
    }

    #[test]
    fn a_folder_without_its_marker_is_waited_for() {
        let start = Clock::manual().now();
        let mut settle = Settle::new(Duration::ZERO, start, stamp(&[1]));
        assert!(!settle.observe(start, stamp(&[2]), false));
        assert!(settle.observe(start, stamp(&[2, 0]), true));
    }

    #[cfg(unix)]
    #[test]
    fn a_swapped_link_a_rewritten_file_and_a_new_file_are_seen() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| dir.path().join(name);
        // As a ConfigMap is mounted: recipe.yaml -> ..data/recipe.yaml, ..data -> a folder of this version.
        for version in ["..1", "..2"] {
            std::fs::create_dir(path(version)).expect("a folder");
            std::fs::write(path(version).join("recipe.yaml"), "same size").expect("written");
        }
        std::os::unix::fs::symlink("..1", path("..data")).expect("linked");
        std::os::unix::fs::symlink("..data/recipe.yaml", path("recipe.yaml")).expect("linked");
        std::fs::create_dir(path("rm")).expect("a folder");
        let watched = Watched { files: vec![path("recipe.yaml")], folders: vec![path("rm")] };
        let (before, complete) = look(&watched, Some(".complete"));
        assert!(!complete);
        assert_eq!(look(&watched, None), (before.clone(), true));
        std::os::unix::fs::symlink("..2", path("..new")).expect("linked");
        std::fs::rename(path("..new"), path("..data")).expect("swapped");
        let (swapped, _) = look(&watched, None);
        assert_ne!(swapped, before);
        std::fs::write(path("rm").join(".complete"), "").expect("written");
        let (grown, complete) = look(&watched, Some(".complete"));
        assert!(complete);
        assert_ne!(grown, swapped);
        std::fs::remove_dir_all(path("rm")).expect("removed");
        assert_ne!(look(&watched, None).0, grown);
    }

    proptest! {
        #[test]
        fn a_trigger_always_has_a_quiet_time_before_it(steps in prop::collection::vec((0u64..15, 0u64..3, any::<bool>()), 1..60)) {
            let start = Clock::manual().now();
            let mut settle = Settle::new(WAIT, start, stamp(&[0]));
            let (mut now, mut last_change, mut previous, mut acted) = (start, start, 0, 0);
            for (seconds, size, complete) in steps {
                now += Duration::from_secs(seconds);
                if size != previous {
                    (previous, last_change) = (size, now);
                }
                if settle.observe(now, stamp(&[size]), complete) {
                    prop_assert!(complete && now - last_change >= WAIT && size != acted);
                    acted = size;
                } else {
                    prop_assert!(!complete || now - last_change < WAIT || size == acted);
                }
            }
        }
    }
}
