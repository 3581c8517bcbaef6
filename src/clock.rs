//! The one place that asks for the time, so that tests can own it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use crate::lock::lock;

/// Where the time comes from: the machine, or a test's hand.
#[derive(Clone, Debug, Default)]
pub struct Clock(Option<Arc<Hand>>);

#[derive(Debug)]
struct Hand {
    time: Mutex<Manual>,
    moved: Notify,
}

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
        Self(Some(Arc::new(Hand { time: Mutex::new(start), moved: Notify::new() })))
    }

    /// Monotonic time, for durations and deadlines.
    pub fn now(&self) -> Instant {
        match &self.0 {
            None => Instant::now(),
            Some(hand) => lock(&hand.time).now,
        }
    }

    /// Calendar time, for stamps that people read.
    pub fn wall(&self) -> SystemTime {
        match &self.0 {
            None => SystemTime::now(),
            Some(hand) => lock(&hand.time).wall,
        }
    }

    /// Moves a manual clock forward; the system's clock moves by itself, so there it does nothing.
    pub fn advance(&self, by: Duration) {
        if let Some(hand) = &self.0 {
            let mut manual = lock(&hand.time);
            manual.now += by;
            manual.wall += by;
            drop(manual);
            hand.moved.notify_waiters();
        }
    }

    /// Blocks this thread for a while; a manual clock moves on by itself, so that whoever waits on one is not held up.
    pub fn pause(&self, time: Duration) {
        if self.0.is_some() {
            return self.advance(time);
        }
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::park_timeout(left);
        }
    }

    /// Completes when the time is `deadline` or later: by tokio's timer, or when the hand of a manual clock gets there.
    pub async fn sleep_until(&self, deadline: Instant) {
        let Some(hand) = &self.0 else {
            // tokio's timer counts whole milliseconds, also until a time that has passed.
            if Instant::now() < deadline {
                tokio::time::sleep_until(deadline.into()).await;
            }
            return;
        };
        loop {
            // Asked for before the time is read, so that a move in between is not missed.
            let moved = hand.moved.notified();
            if self.now() >= deadline {
                return;
            }
            moved.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_waits_for_what_has_passed() {
        let clock = Clock::system();
        let mut asleep = std::pin::pin!(clock.sleep_until(clock.now()));
        let polled = std::future::poll_fn(|context| std::task::Poll::Ready(asleep.as_mut().poll(context)));
        assert!(polled.await.is_ready());
    }

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
