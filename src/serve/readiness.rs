//! Whether this process wants requests, in one place that probes, health checks and the drain all read.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::lock::lock;

/// Where a server is in its life. It only moves forward, but for the pause of a reload in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing is loaded yet.
    Starting,
    /// Nothing is live while a generation is loaded in the place of another.
    Reloading,
    /// A generation is live.
    Ready,
    /// Requests are still served, but new ones should go elsewhere.
    Draining,
    /// New requests are refused, and open health watches end.
    Stopping,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Reloading => "reloading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        }
    }
}

/// The phase of this process. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shown: watch::Sender<Phase>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    reached: Phase,
    paused: bool,
}

impl State {
    fn shown(self) -> Phase {
        if self.paused && self.reached == Phase::Ready { Phase::Reloading } else { self.reached }
    }
}

impl Default for Readiness {
    fn default() -> Self {
        let state = State { reached: Phase::Starting, paused: false };
        Self(Arc::new(Inner { shown: watch::Sender::new(state.shown()), state: Mutex::new(state) }))
    }
}

impl Readiness {
    pub fn phase(&self) -> Phase {
        *self.0.shown.borrow()
    }

    /// Moves on to `phase`; a phase that has passed does not come back.
    pub fn advance(&self, phase: Phase) {
        self.change(|state| state.reached = phase.max(state.reached));
    }

    /// A server that is ready is not while this is set.
    pub fn pause(&self, paused: bool) {
        self.change(|state| state.paused = paused);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        // The state is whole after every change, whatever panics elsewhere.
        let mut state = lock(&self.0.state);
        change(&mut state);
        let now = state.shown();
        self.0.shown.send_if_modified(|shown| std::mem::replace(shown, now) != now);
    }

    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.0.shown.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_drains_does_not_become_ready_again() {
        let readiness = Readiness::default();
        assert_eq!(readiness.phase(), Phase::Starting);
        readiness.advance(Phase::Draining);
        readiness.advance(Phase::Ready);
        assert_eq!(readiness.phase(), Phase::Draining);
    }

    #[test]
    fn a_pause_is_of_a_ready_server_alone() {
        let readiness = Readiness::default();
        readiness.pause(true);
        assert_eq!(readiness.phase(), Phase::Starting);
        readiness.advance(Phase::Ready);
        assert_eq!(readiness.phase(), Phase::Reloading);
        readiness.pause(false);
        assert_eq!(readiness.phase(), Phase::Ready);
        readiness.pause(true);
        readiness.advance(Phase::Draining);
        assert_eq!(readiness.phase(), Phase::Draining);
    }
}
