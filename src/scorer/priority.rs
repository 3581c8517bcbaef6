//! Threads that stand behind others, so that a machine that is busy does what somebody waits for first.

use crate::model::run_when_idle;

/// How far behind [`stand_back_far`] puts a thread: beside one that is not nice it gets a thirtieth of the time.
const FAR: u8 = 15;

/// Lowers the priority of this thread to so many steps of niceness behind the process's own. Where that cannot be done it
/// runs all the same, and takes more of the machine.
#[cfg(target_os = "linux")]
pub(crate) fn stand_back(by: u8) {
    use rustix::process::{getpid, getpriority_process, setpriority_process};
    // On Linux these are of one thread alone, and a new thread has that of the one that made it. The process's first thread
    // keeps what the process was started with.
    if by > 0
        && let Ok(own) = getpriority_process(Some(getpid()))
        && let Err(error) = setpriority_process(None, (own + i32::from(by)).min(19))
    {
        tracing::debug!(%error, "the priority of a thread stays as it is");
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn stand_back(_: u8) {}

/// Puts this thread behind all others of any niceness: it runs where nothing else wants to, and gives way as soon as
/// something does. A thread that is only nice runs seldom, but to the end of its turn, and whoever wakes up meanwhile waits
/// for that: 4 ms, as long as a small request takes as a whole.
pub(crate) fn stand_last() {
    stand_back_far();
    if let Err(error) = run_when_idle() {
        tracing::debug!(%error, "a thread stands behind others as far as its niceness goes");
    }
}

/// Puts this thread far behind others, and gives it a small part of the time all the same.
pub(crate) fn stand_back_far() {
    stand_back(FAR);
}

/// Whether this thread gets less than a twentieth of the time that it wants: works for two milliseconds, and looks at how long
/// that took.
#[cfg(target_os = "linux")]
pub(crate) fn starved() -> bool {
    use std::time::Duration;

    use rustix::time::{ClockId, clock_gettime};

    use crate::clock::Clock;

    const ASKED: Duration = Duration::from_millis(2);
    let own = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
    };
    let (clock, before) = (Clock::system(), own());
    let end = clock.now() + 20 * ASKED;
    while own().saturating_sub(before) < ASKED {
        if clock.now() >= end {
            return true;
        }
    }
    false
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn starved() -> bool {
    false
}

/// How nice this thread is.
#[cfg(all(test, target_os = "linux"))]
pub(crate) fn niceness() -> i32 {
    rustix::process::getpriority_process(None).expect("a priority")
}

/// Whether this thread stands behind all others.
#[cfg(all(test, target_os = "linux"))]
pub(crate) fn stands_last() -> bool {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("a thread");
    // The policy is the 41st field; the second is a name, which may hold anything.
    let (_, rest) = stat.rsplit_once(") ").expect("a name");
    rest.split(' ').nth(38) == Some("5")
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::{getpid, getpriority_process};

    use super::*;

    #[test]
    fn a_thread_stands_as_far_behind_as_it_was_told_last_however_often_and_its_process_stays() {
        let own = || getpriority_process(Some(getpid())).expect("a priority");
        let before = own();
        let found = std::thread::spawn(|| {
            [3, 7, 7, 0].map(|by| {
                stand_back(by);
                niceness()
            })
        });
        let expected = [3, 7, 7, 7].map(|by| (before + by).min(19));
        assert_eq!(found.join().expect("no panic"), expected);
        assert_eq!(own(), before);
    }

    #[test]
    fn a_thread_that_stands_last_leaves_the_others_where_they_are() {
        assert!(!stands_last());
        let found = std::thread::spawn(|| {
            stand_last();
            stands_last()
        });
        assert!(found.join().expect("no panic"));
        assert!(!stands_last());
    }
}
