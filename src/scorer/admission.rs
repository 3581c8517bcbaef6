//! Who may come in: bounds on requests, bytes and tokens in flight, in two gates.
//!
//! The first gate ([`Admission::admit`]) stands where a request's headers arrive: a slot and room for the bytes its
//! message may have, so that a refusal costs no reading. The second ([`Permit::charge`]) stands before encoding, where
//! tokens are still an estimate by the bytes; [`Permit::correct`] puts the true number in its place afterwards. What is alone
//! always passes a gate, so that nothing is refused for ever by an estimate. The permit travels inside the job and gives everything back when the last of its clones is dropped.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::{ScorerMetrics, lock};

/// Bounds on what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionOptions {
    pub max_requests: usize,
    pub max_bytes: u64,
    pub max_tokens: u64,
    /// When a caller that was shed should try again.
    pub retry_after: Duration,
}

impl Default for AdmissionOptions {
    fn default() -> Self {
        Self { max_requests: 1024, max_bytes: 1 << 30, max_tokens: 4 << 20, retry_after: Duration::from_secs(1) }
    }
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShedReason {
    /// All request slots are taken.
    Requests,
    /// The bytes in flight are at their bound.
    Bytes,
    /// The tokens in flight are at their bound.
    Tokens,
    /// More tokens than may ever be in flight: trying again does not help.
    TooLarge,
    /// The device's queue is full.
    Queue,
    /// The server is about to stop.
    Draining,
}

impl ShedReason {
    pub const ALL: [Self; 6] = [Self::Requests, Self::Bytes, Self::Tokens, Self::TooLarge, Self::Queue, Self::Draining];

    /// The name used in metric labels and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Bytes => "bytes",
            Self::Tokens => "tokens",
            Self::TooLarge => "too_large",
            Self::Queue => "queue",
            Self::Draining => "draining",
        }
    }
}

/// A request that was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Shed {
    pub reason: ShedReason,
    pub retry_after: Duration,
    pub message: String,
}

/// The bounds and what is in flight under them. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: AdmissionOptions,
    state: Mutex<State>,
    requests: watch::Sender<usize>,
    metrics: ScorerMetrics,
}

#[derive(Debug, Default)]
struct State {
    requests: usize,
    bytes: u64,
    tokens: u64,
    draining: bool,
}

impl Admission {
    pub fn new(options: AdmissionOptions, metrics: ScorerMetrics) -> Self {
        Self(Arc::new(Inner { options, state: Mutex::default(), requests: watch::Sender::new(0), metrics }))
    }

    /// The first gate: a slot, and room for a message of up to `bytes`.
    pub fn admit(&self, bytes: u64) -> Result<Permit, Shed> {
        let mut state = lock(&self.0.state);
        let options = &self.0.options;
        let refusal = if state.draining {
            Some((ShedReason::Draining, "the server is about to stop".to_owned()))
        } else if state.requests >= options.max_requests {
            Some((ShedReason::Requests, format!("{} requests are in flight, which is the bound", state.requests)))
        } else if state.requests > 0 && state.bytes.saturating_add(bytes) > options.max_bytes {
            // A request that is alone always fits: its size is bounded by the message limit.
            Some((ShedReason::Bytes, self.0.bytes_taken(state.bytes)))
        } else {
            None
        };
        if let Some((reason, message)) = refusal {
            drop(state);
            return Err(self.0.shed(reason, message));
        }
        state.requests += 1;
        state.bytes += bytes;
        self.0.show(&state);
        Ok(Permit(Some(Arc::new(Held { admission: self.0.clone(), charge: Mutex::new(Charge { bytes, tokens: 0 }) }))))
    }

    /// Refuses every request from now on. What has a permit is finished.
    pub fn drain(&self) {
        lock(&self.0.state).draining = true;
    }

    pub fn is_draining(&self) -> bool {
        lock(&self.0.state).draining
    }

    /// The number of requests that hold a permit, as it changes.
    pub fn in_flight(&self) -> watch::Receiver<usize> {
        self.0.requests.subscribe()
    }

    /// Completes when no request holds a permit. How long to wait is the caller's decision.
    pub async fn idle(&self) {
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = self.in_flight().wait_for(|&requests| requests == 0).await;
    }
}

impl Inner {
    fn shed(&self, reason: ShedReason, message: String) -> Shed {
        self.metrics.shed.with_label_values(&[reason.name()]).inc();
        Shed { reason, retry_after: self.options.retry_after, message }
    }

    fn bytes_taken(&self, bytes: u64) -> String {
        format!("requests of {bytes} bytes are in flight, of at most {}", self.options.max_bytes)
    }

    /// Called under the lock, so that what is shown never goes back in time.
    fn show(&self, state: &State) {
        self.metrics.in_flight_requests.set(state.requests as i64);
        self.metrics.in_flight_bytes.set(state.bytes as i64);
        self.metrics.in_flight_tokens.set(state.tokens as i64);
        self.requests.send_if_modified(|requests| std::mem::replace(requests, state.requests) != state.requests);
    }
}

#[derive(Clone, Copy, Debug)]
struct Charge {
    bytes: u64,
    tokens: u64,
}

#[derive(Debug)]
struct Held {
    admission: Arc<Inner>,
    charge: Mutex<Charge>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let charge = *lock(&self.charge);
        let mut state = lock(&self.admission.state);
        state.requests -= 1;
        state.bytes -= charge.bytes;
        state.tokens -= charge.tokens;
        self.admission.show(&state);
    }
}

/// The right to be in flight. Clones share it; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Permit(Option<Arc<Held>>);

impl Permit {
    /// A permit under no bound: for work that is not a remote request.
    pub fn unlimited() -> Self {
        Self(None)
    }

    /// The second gate: room for `tokens`, an estimate, instead of what was charged before.
    pub fn charge(&self, tokens: u64) -> Result<(), Shed> {
        let Some(held) = &self.0 else { return Ok(()) };
        let (admission, mut charge) = (&held.admission, lock(&held.charge));
        let most = admission.options.max_tokens;
        let mut state = lock(&admission.state);
        let others = state.tokens - charge.tokens;
        if tokens > charge.tokens && others > 0 && others.saturating_add(tokens) > most {
            let message = format!("{others} tokens are in flight, and {tokens} more would exceed {most}");
            drop(state);
            return Err(admission.shed(ShedReason::Tokens, message));
        }
        state.tokens = others + tokens;
        charge.tokens = tokens;
        admission.show(&state);
        Ok(())
    }

    /// Puts the true number of tokens in the place of the estimate. What was let in is not refused any more, so the
    /// bound may be exceeded by what the estimate was too low; only what alone exceeds it is too large.
    pub fn correct(&self, tokens: u64) -> Result<(), Shed> {
        let Some(held) = &self.0 else { return Ok(()) };
        let most = held.admission.options.max_tokens;
        if tokens > most {
            let message = format!("{tokens} tokens in one request, expected at most {most}: send fewer samples at a time");
            return Err(held.admission.shed(ShedReason::TooLarge, message));
        }
        self.adjust(|charge| charge.tokens = tokens);
        Ok(())
    }

    /// Room for `bytes` instead of what was charged before: what a message takes once it is read. A request that is alone
    /// always fits.
    pub fn charge_bytes(&self, bytes: u64) -> Result<(), Shed> {
        let Some(held) = &self.0 else { return Ok(()) };
        let (admission, mut charge) = (&held.admission, lock(&held.charge));
        let mut state = lock(&admission.state);
        let others = state.bytes - charge.bytes;
        if bytes > charge.bytes && state.requests > 1 && others.saturating_add(bytes) > admission.options.max_bytes {
            drop(state);
            return Err(admission.shed(ShedReason::Bytes, admission.bytes_taken(others)));
        }
        state.bytes = others + bytes;
        charge.bytes = bytes;
        admission.show(&state);
        Ok(())
    }

    /// Room for at least `bytes`: as much has come of its message, and is kept.
    pub fn grow_bytes(&self, bytes: u64) -> Result<(), Shed> {
        let charged = self.0.as_ref().map_or(bytes, |held| lock(&held.charge).bytes);
        if bytes > charged { self.charge_bytes(bytes) } else { Ok(()) }
    }

    /// Nothing is left of the request but its reply, of so many bytes.
    pub fn scored(&self, bytes: u64) {
        self.adjust(|charge| *charge = Charge { bytes, tokens: 0 });
    }

    fn adjust(&self, change: impl FnOnce(&mut Charge)) {
        let Some(held) = &self.0 else { return };
        let mut charge = lock(&held.charge);
        let mut state = lock(&held.admission.state);
        state.bytes -= charge.bytes;
        state.tokens -= charge.tokens;
        change(&mut charge);
        state.bytes += charge.bytes;
        state.tokens += charge.tokens;
        held.admission.show(&state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn admission(max_requests: usize, max_bytes: u64, max_tokens: u64) -> Admission {
        let options = AdmissionOptions { max_requests, max_bytes, max_tokens, retry_after: Duration::from_millis(7) };
        Admission::new(options, ScorerMetrics::unregistered())
    }

    fn reason(refused: Result<impl std::fmt::Debug, Shed>) -> ShedReason {
        refused.expect_err("no room").reason
    }

    #[test]
    fn each_bound_refuses_by_its_name_and_room_comes_back() {
        let admission = admission(2, 100, 10);
        let first = admission.admit(60).expect("room");
        assert_eq!(reason(admission.admit(60)), ShedReason::Bytes);
        first.charge_bytes(30).expect("less than before");
        let second = admission.admit(60).expect("room after the correction");
        let shed = admission.admit(1).expect_err("two are in flight");
        assert_eq!((shed.reason, shed.retry_after), (ShedReason::Requests, Duration::from_millis(7)));
        first.charge(8).expect("room");
        assert_eq!(reason(second.charge(3)), ShedReason::Tokens);
        assert_eq!(reason(second.correct(11)), ShedReason::TooLarge);
        first.correct(4).expect("below the bound");
        second.charge(6).expect("room after the correction");
        drop(first);
        assert!(admission.admit(1).is_ok());
        let count = |reason: &str| admission.0.metrics.shed.with_label_values(&[reason]).get();
        assert_eq!([count("bytes"), count("requests"), count("tokens"), count("too_large"), count("queue")], [1, 1, 1, 1, 0]);
    }

    #[test]
    fn a_request_alone_may_have_any_number_of_bytes() {
        assert!(admission(2, 100, 10).admit(1000).is_ok());
    }

    #[test]
    fn a_request_alone_may_be_taken_for_any_number_of_tokens_and_is_too_large_only_by_their_count() {
        let admission = admission(2, 100, 10);
        let (permit, other) = (admission.admit(1).expect("room"), admission.admit(1).expect("room"));
        permit.charge(1000).expect("nothing else has tokens in flight");
        assert_eq!(reason(other.charge(1)), ShedReason::Tokens);
        permit.correct(10).expect("as many as may be in flight");
        assert_eq!(reason(permit.correct(11)), ShedReason::TooLarge);
    }

    #[test]
    fn a_permit_ends_with_its_last_clone() {
        let admission = admission(1, 100, 10);
        let permit = admission.admit(1).expect("room");
        let clone = permit.clone();
        drop(permit);
        assert_eq!(*admission.in_flight().borrow(), 1);
        drop(clone);
        assert_eq!(*admission.in_flight().borrow(), 0);
        Permit::unlimited().charge(u64::MAX).expect("no bound");
    }

    #[tokio::test]
    async fn draining_refuses_the_new_and_waits_for_the_old() {
        let admission = admission(4, 100, 10);
        let permit = admission.admit(1).expect("room");
        admission.drain();
        assert_eq!(reason(admission.admit(1)), ShedReason::Draining);
        permit.charge(5).expect("what was admitted is finished");
        let idle = admission.idle();
        tokio::pin!(idle);
        let waits = tokio::select! { biased; () = &mut idle => false, () = std::future::ready(()) => true };
        assert!(waits, "a request is in flight");
        drop(permit);
        idle.await;
    }

    proptest! {
        #[test]
        fn everything_is_back_when_all_permits_are_gone(steps in prop::collection::vec((0u8..5, 0u64..50, 0usize..6), 1..60)) {
            let admission = admission(5, 120, 90);
            let mut permits: Vec<Permit> = Vec::new();
            for (action, amount, which) in steps {
                let permit = if permits.is_empty() { None } else { permits.get(which % permits.len()) };
                match (action, permit) {
                    (0 | 1, _) => permits.extend(admission.admit(amount)),
                    (2, Some(permit)) => { let _ = permit.charge(amount); }
                    (3, Some(permit)) => { let _ = permit.correct(amount); let _ = permit.charge_bytes(amount); }
                    (4, Some(permit)) if which > 3 => permit.scored(amount),
                (4, Some(_)) => { let place = which % permits.len(); permits.swap_remove(place); }
                    _ => {}
                }
                prop_assert_eq!(*admission.in_flight().borrow(), permits.len());
                prop_assert!(permits.len() <= 5);
            }
            permits.clear();
            let state = lock(&admission.0.state);
            prop_assert_eq!((state.requests, state.bytes, state.tokens), (0, 0, 0));
        }
    }
}
