//! How far a load has come, at most once a second.

use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::registry::Progress;

const EVERY: Duration = Duration::from_secs(1);

/// Lets a report through when a second has passed since the last one.
pub(super) struct Reports {
    clock: Clock,
    last: Instant,
}

impl Reports {
    pub(super) fn new(clock: Clock) -> Self {
        Self { last: clock.now(), clock }
    }

    /// The words for this step, if it is time to say them.
    pub(super) fn say(&mut self, progress: &Progress) -> Option<String> {
        let now = self.clock.now();
        if now.saturating_duration_since(self.last) < EVERY {
            return None;
        }
        self.last = now;
        let percent = if progress.total == 0 { 100.0 } else { 100.0 * progress.done as f64 / progress.total as f64 };
        Some(format!("{}: {percent:.0} %", progress.stage))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_comes_at_most_once_a_second() {
        let clock = Clock::manual();
        let mut reports = Reports::new(clock.clone());
        let progress = Progress { stage: "merge".into(), done: 1, total: 4 };
        assert_eq!(reports.say(&progress), None);
        clock.advance(Duration::from_secs(1));
        assert_eq!(reports.say(&progress).as_deref(), Some("merge: 25 %"));
        assert_eq!(reports.say(&progress), None);
    }
}
