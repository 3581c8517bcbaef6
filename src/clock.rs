//! The one place that asks for the time, so that tests can own it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// Where the time comes from: the machine, or a test's hand.
#[derive(Clone, Debug, Default)]
pub struct Clock(Option<Arc<Mutex<Manual>>>);

#[derive(Debug)]
struct Manual {
    now: Instant,
    wall: SystemTime,
}

impl Clock {
    /// The machine's own clock.
    pub fn system() -> Self {
        Self(None)
    }

    /// A clock that stands still until [`Clock::advance`] moves it.
    pub fn manual() -> Self {
        let start = Manual { now: Instant::now(), wall: SystemTime::UNIX_EPOCH };
        Self(Some(Arc::new(Mutex::new(start))))
    }

    /// Monotonic time, for durations and deadlines.
    pub fn now(&self) -> Instant {
        match &self.0 {
            None => Instant::now(),
            Some(manual) => lock(manual).now,
        }
    }

    /// Calendar time, for stamps that people read.
    pub fn wall(&self) -> SystemTime {
        match &self.0 {
            None => SystemTime::now(),
            Some(manual) => lock(manual).wall,
        }
    }

    /// Moves a manual clock forward; the system's clock moves by itself, so there it does nothing.
    pub fn advance(&self, by: Duration) {
        if let Some(manual) = &self.0 {
            let mut manual = lock(manual);
            manual.now += by;
            manual.wall += by;
        }
    }
}

// A panic elsewhere cannot leave two plain numbers half-written, so a poisoned lock is still good.
fn lock(manual: &Mutex<Manual>) -> std::sync::MutexGuard<'_, Manual> {
    manual.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_by_hand_and_for_all_its_clones() {
        let clock = Clock::manual();
        let seen_elsewhere = clock.clone();
        let start = clock.now();
        assert_eq!(seen_elsewhere.now(), start);
        clock.advance(Duration::from_secs(3));
        assert_eq!(seen_elsewhere.now() - start, Duration::from_secs(3));
    }
}
