//! The generator: sends requests when they are due and counts what comes back.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::arrivals::Arrivals;
use super::tally::{Answer, Outcome, Tally};
use crate::clock::Clock;

/// Who is asked.
pub(super) trait Target: Send + Sync + 'static {
    /// Sends the request of this number and waits for what becomes of it.
    fn send(&self, number: u64) -> impl Future<Output = Outcome> + Send;
}

/// When requests are sent.
pub(super) enum Pace {
    /// Whenever they are due, whatever has come back. What is due while `in_flight` others are under way is sent late, and
    /// its latency says so.
    Open { arrivals: Arrivals, in_flight: usize },
    /// So many callers, each of whom sends the next request when it has the answer to its last.
    Closed { callers: usize },
}

/// How long requests are sent.
pub(super) struct Window {
    pub warmup: Duration,
    pub duration: Duration,
    /// Requests in all, however long they take.
    pub requests: Option<u64>,
}

/// How late tokio's timer may be. The generator's own thread sleeps the rest of a wait, or every request would be sent late;
/// meanwhile the tasks of the requests note the times of their answers.
const TICK: Duration = Duration::from_millis(1);

/// Runs until the window closes or `stop` completes; the tally holds what was answered until then.
pub(super) async fn run(target: Arc<impl Target>, pace: Pace, window: Window, mut tally: Tally, clock: Clock, stop: impl Future) -> Tally {
    let (mut arrivals, most) = match pace {
        Pace::Open { arrivals, in_flight } => (Some(arrivals), in_flight),
        Pace::Closed { callers } => (None, callers),
    };
    let start = clock.now();
    let end = window.warmup.saturating_add(window.duration);
    let since = move |clock: &Clock| clock.now().saturating_duration_since(start);
    let mut flying: JoinSet<Answer> = JoinSet::new();
    let mut number = 0;
    let mut due = arrivals.as_mut().map_or(Duration::ZERO, Arrivals::next);
    let mut stop = std::pin::pin!(stop);
    loop {
        let more = due < end && window.requests.is_none_or(|requests| number < requests);
        if !more && flying.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            _ = &mut stop => break,
            Some(answer) = flying.join_next(), if !flying.is_empty() => {
                if let Ok(answer) = answer {
                    tally.record(&answer);
                }
                if arrivals.is_none() {
                    due = since(&clock);
                }
            }
            () = clock.sleep_until(start + due.saturating_sub(TICK)), if more && flying.len() < most => {
                clock.pause(due.saturating_sub(since(&clock)));
                let (target, clock) = (target.clone(), clock.clone());
                flying.spawn(async move {
                    let sent = since(&clock);
                    let outcome = target.send(number).await;
                    Answer { number, due, sent, done: since(&clock), outcome }
                });
                number += 1;
                due = arrivals.as_mut().map_or(due, Arrivals::next);
            }
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::tally::ServerTiming;
    use super::*;

    /// Every answer takes so long by a clock that the requests themselves move.
    struct Slow {
        clock: Clock,
        takes: Duration,
        under_way: AtomicUsize,
        most: AtomicUsize,
    }

    impl Slow {
        fn new(takes: Duration) -> Arc<Self> {
            Arc::new(Self { clock: Clock::manual(), takes, under_way: AtomicUsize::new(0), most: AtomicUsize::new(0) })
        }
    }

    impl Target for Slow {
        async fn send(&self, number: u64) -> Outcome {
            let under_way = 1 + self.under_way.fetch_add(1, Ordering::Relaxed);
            self.most.fetch_max(under_way, Ordering::Relaxed);
            tokio::task::yield_now().await;
            self.clock.advance(self.takes);
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            Outcome::Scored { rewards: vec![Some(number as f32)], tokens: 1, timing: ServerTiming::default() }
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn window(requests: Option<u64>) -> Window {
        Window { warmup: Duration::ZERO, duration: 10 * SECOND, requests }
    }

    fn tally() -> Tally {
        Tally::new(Duration::ZERO, None)
    }

    #[tokio::test]
    async fn a_closed_loop_keeps_its_callers_busy_until_the_window_closes() {
        let target = Slow::new(SECOND / 4);
        let clock = target.clock.clone();
        let tally = run(target.clone(), Pace::Closed { callers: 3 }, window(None), tally(), clock, std::future::pending::<()>()).await;
        // Sent while less than ten seconds had passed, at a quarter of a second each.
        assert!((40..=42).contains(&tally.answers), "{}", tally.answers);
        assert_eq!(target.most.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn an_open_loop_behind_a_slow_server_counts_the_wait_of_what_it_could_not_send() {
        // Due a hundred times a second, answered ten times a second, one at a time.
        let target = Slow::new(SECOND / 10);
        let clock = target.clock.clone();
        // Something must move the clock to the first arrival.
        clock.advance(SECOND);
        let pace = Pace::Open { arrivals: Arrivals::poisson(100.0, 5), in_flight: 1 };
        let hand = clock.clone();
        let tick = async move {
            loop {
                tokio::task::yield_now().await;
                hand.advance(Duration::from_millis(1));
            }
        };
        let load = run(target.clone(), pace, window(Some(50)), tally(), clock, std::future::pending::<()>());
        let tally = tokio::select! { tally = load => tally, () = tick => unreachable!("ticks for ever") };
        assert_eq!((tally.answers, target.most.load(Ordering::Relaxed)), (50, 1));
        // The last of fifty was due after half a second and answered after five.
        let worst = tally.scored.summary().max;
        assert!(worst >= 4 * SECOND, "{worst:?}");
        assert!(tally.scored.summary().p50 >= 2 * SECOND - SECOND / 5);
    }

    #[tokio::test]
    async fn a_number_of_requests_is_kept_to_and_a_stop_keeps_what_was_answered() {
        let target = Slow::new(SECOND / 100);
        let clock = target.clock.clone();
        let counted =
            run(target.clone(), Pace::Closed { callers: 2 }, window(Some(7)), tally(), clock.clone(), std::future::pending::<()>());
        assert_eq!(counted.await.answers, 7);
        let stopped =
            run(target.clone(), Pace::Closed { callers: 2 }, window(None), tally(), clock.clone(), clock.sleep_until(clock.now() + SECOND));
        let answers = stopped.await.answers;
        assert!((90..=102).contains(&answers), "{answers}");
    }
}
