//! Who may come in: bounds on requests, bytes and tokens in flight, in two gates.
//!
//! The first gate ([`Admission::admit`]) stands where a request's headers arrive: a slot and room for the bytes its
//! message may have, so that a refusal costs no reading. The second ([`Permit::charge`]) stands before encoding, where
//! tokens are still an estimate by the bytes; [`Permit::correct`] puts the true number in its place afterwards. What is alone
//! always passes a gate, so that nothing is refused for ever by an estimate. The permit travels inside the job and gives
//! everything back when the last of its clones is dropped.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::ScorerMetrics;
use super::pace::{self, spread};
use super::shares::{Caller, Held, Refusal, Resource, Shares};
use crate::lock::lock;

/// Bounds on what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionOptions {
    pub max_requests: usize,
    pub max_bytes: u64,
    pub max_tokens: u64,
    /// About when a caller that was shed should try again, where nothing better is known.
    pub retry_after: Duration,
    /// That score what is let in.
    pub devices: usize,
}

impl Default for AdmissionOptions {
    fn default() -> Self {
        Self { max_requests: 1024, max_bytes: 1 << 30, max_tokens: 4 << 20, retry_after: Duration::from_secs(1), devices: 1 }
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
    /// A tenant holds more than its share of what is more than half taken.
    Share,
    /// The caller would not wait as long as what is ahead of it takes.
    Deadline,
    /// The device's queue is full.
    Queue,
    /// The server is about to stop.
    Draining,
}

impl ShedReason {
    pub const ALL: [Self; 8] =
        [Self::Requests, Self::Bytes, Self::Tokens, Self::TooLarge, Self::Share, Self::Deadline, Self::Queue, Self::Draining];

    /// The name used in metric labels and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Bytes => "bytes",
            Self::Tokens => "tokens",
            Self::TooLarge => "too_large",
            Self::Share => "share",
            Self::Deadline => "deadline",
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
    shares: Shares,
    draining: bool,
    /// Requests that were refused.
    refused: u64,
}

impl Admission {
    pub fn new(options: AdmissionOptions, metrics: ScorerMetrics) -> Self {
        Self(Arc::new(Inner { options, state: Mutex::default(), requests: watch::Sender::new(0), metrics }))
    }

    /// [`Admission::admit_of`] for a request that belongs to nobody.
    pub fn admit(&self, bytes: u64) -> Result<Permit, Shed> {
        self.admit_of(&Caller::default(), bytes, None)
    }

    /// The first gate: a slot, and room for a message of up to `bytes`; not for one whose caller will have gone before its
    /// turn comes. `patience` is how long it waits.
    pub fn admit_of(&self, caller: &Caller, bytes: u64, patience: Option<Duration>) -> Result<Permit, Shed> {
        let new = Held { requests: 1, bytes, tokens: 0 };
        let state = lock(&self.0.state);
        let tenant = state.shares.tenant(caller);
        let refused = if state.draining {
            Some((ShedReason::Draining, "the server is about to stop".to_owned()))
        } else {
            let room =
                [Resource::Requests, Resource::Bytes].map(|resource| self.0.room(&state, tenant.as_ref(), resource, 0, new.of(resource)));
            room.into_iter().find_map(Result::err)
        };
        if let Some((reason, message)) = refused {
            return Err(self.0.shed(state, reason, message));
        }
        let mut state = self.0.in_time(state, tenant.as_ref(), patience)?;
        let peer = caller.peer.clone();
        state.shares.replace(tenant.as_ref(), peer.as_ref(), Held::default(), new);
        self.0.show(&state);
        Ok(Permit(Some(Arc::new(Grant { admission: self.0.clone(), tenant, charge: Mutex::new(new) }))))
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
    fn shed(&self, state: MutexGuard<'_, State>, reason: ShedReason, message: String) -> Shed {
        self.shed_for(state, reason, message, self.options.retry_after)
    }

    fn shed_for(&self, mut state: MutexGuard<'_, State>, reason: ShedReason, message: String, wait: Duration) -> Shed {
        state.refused += 1;
        let retry_after = spread(wait, state.refused);
        drop(state);
        self.metrics.shed.with_label_values(&[reason.name()]).inc();
        Shed { reason, retry_after, message }
    }

    /// Refuses whoever would wait in vain.
    fn in_time<'a>(
        &self,
        state: MutexGuard<'a, State>,
        tenant: Option<&Arc<str>>,
        patience: Option<Duration>,
    ) -> Result<MutexGuard<'a, State>, Shed> {
        let Some(patience) = patience else { return Ok(state) };
        let ahead = state.shares.ahead(tenant.map(|tenant| &**tenant));
        let wait = lock(&self.metrics.pace).wait(usize::try_from(ahead).unwrap_or(usize::MAX), self.options.devices);
        match wait {
            Some(wait) if !pace::in_time(wait, patience) => {
                let [wait_ms, left] = [wait, patience].map(|time| time.as_millis());
                let message = format!("{ahead} tokens are ahead, which takes about {wait_ms} ms, and the deadline is in {left} ms");
                Err(self.shed_for(state, ShedReason::Deadline, message, wait))
            }
            _ => Ok(state),
        }
    }

    /// Whether there is room for `new` of a resource in the place of `old`; the reason and words of the refusal otherwise.
    fn room(&self, state: &State, tenant: Option<&Arc<str>>, resource: Resource, old: u64, new: u64) -> Result<(), (ShedReason, String)> {
        let (bound, reason, things) = match resource {
            Resource::Requests => (self.options.max_requests as u64, ShedReason::Requests, "requests"),
            Resource::Bytes => (self.options.max_bytes, ShedReason::Bytes, "bytes of requests"),
            Resource::Tokens => (self.options.max_tokens, ShedReason::Tokens, "tokens"),
        };
        state.shares.room(tenant.map(|tenant| &**tenant), resource, bound, old, new).map_err(|refusal| match refusal {
            Refusal::Full { held } => (reason, format!("{held} {things} are in flight, and {new} more would exceed {bound}")),
            Refusal::Share { held, share } => (
                ShedReason::Share,
                format!("{held} {things} of this tenant are in flight, and its share while others may come is {share} of {bound}"),
            ),
        })
    }

    /// Called under the lock, so that what is shown never goes back in time.
    fn show(&self, state: &State) {
        let Held { requests, bytes, tokens } = state.shares.all();
        self.metrics.in_flight_requests.set(requests as i64);
        self.metrics.in_flight_bytes.set(bytes as i64);
        self.metrics.in_flight_tokens.set(tokens as i64);
        let requests = usize::try_from(requests).unwrap_or(usize::MAX);
        self.requests.send_if_modified(|shown| std::mem::replace(shown, requests) != requests);
    }
}

#[derive(Debug)]
struct Grant {
    admission: Arc<Inner>,
    tenant: Option<Arc<str>>,
    charge: Mutex<Held>,
}

impl Grant {
    /// Changes what is charged, where there is room for it.
    fn change(&self, resource: Option<Resource>, change: impl FnOnce(Held) -> Held) -> Result<(), Shed> {
        let admission = &self.admission;
        let mut charge = lock(&self.charge);
        let mut state = lock(&admission.state);
        let (old, new) = (*charge, change(*charge));
        let room = resource.map_or(Ok(()), |what| admission.room(&state, self.tenant.as_ref(), what, old.of(what), new.of(what)));
        if let Err((reason, message)) = room {
            return Err(admission.shed(state, reason, message));
        }
        state.shares.replace(self.tenant.as_ref(), None, old, new);
        *charge = new;
        admission.show(&state);
        Ok(())
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        // Nothing has to have room for this.
        let _ = self.change(None, |_| Held::default());
    }
}

/// The right to be in flight. Clones share it; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Permit(Option<Arc<Grant>>);

impl Permit {
    /// A permit under no bound: for work that is not a remote request.
    pub fn unlimited() -> Self {
        Self(None)
    }

    /// Whose share it is of; nobody's where nobody says.
    pub fn tenant(&self) -> Option<Arc<str>> {
        self.0.as_ref()?.tenant.clone()
    }

    fn change(&self, resource: Option<Resource>, change: impl FnOnce(Held) -> Held) -> Result<(), Shed> {
        self.0.as_ref().map_or(Ok(()), |grant| grant.change(resource, change))
    }

    /// Refuses a caller that would wait in vain, by what is ahead of it now.
    pub fn in_time(&self, patience: Option<Duration>) -> Result<(), Shed> {
        let Some(grant) = &self.0 else { return Ok(()) };
        grant.admission.in_time(lock(&grant.admission.state), grant.tenant.as_ref(), patience).map(drop)
    }

    /// The second gate: room for `tokens`, an estimate, instead of what was charged before.
    pub fn charge(&self, tokens: u64) -> Result<(), Shed> {
        self.change(Some(Resource::Tokens), |old| Held { tokens, ..old })
    }

    /// Puts the true number of tokens in the place of the estimate. What was let in is not refused any more, so the
    /// bound may be exceeded by what the estimate was too low; only what alone exceeds it is too large.
    pub fn correct(&self, tokens: u64) -> Result<(), Shed> {
        let Some(grant) = &self.0 else { return Ok(()) };
        let most = grant.admission.options.max_tokens;
        if tokens > most {
            let message = format!("{tokens} tokens in one request, expected at most {most}: send fewer samples at a time");
            return Err(grant.admission.shed(lock(&grant.admission.state), ShedReason::TooLarge, message));
        }
        self.change(None, |old| Held { tokens, ..old })
    }

    /// Room for `bytes` instead of what was charged before: what a message takes once it is read. A request that is alone
    /// always fits.
    pub fn charge_bytes(&self, bytes: u64) -> Result<(), Shed> {
        self.change(Some(Resource::Bytes), |old| Held { bytes, ..old })
    }

    /// Room for at least `bytes`: as much has come of its message, and is kept.
    pub fn grow_bytes(&self, bytes: u64) -> Result<(), Shed> {
        self.change(Some(Resource::Bytes), |old| Held { bytes: bytes.max(old.bytes), ..old })
    }

    /// Nothing is left of the request but its reply, of so many bytes.
    pub fn scored(&self, bytes: u64) {
        // Nothing has to have room for this.
        let _ = self.change(None, |old| Held { bytes, tokens: 0, ..old });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn admission(max_requests: usize, max_bytes: u64, max_tokens: u64) -> Admission {
        let options = AdmissionOptions { max_requests, max_bytes, max_tokens, retry_after: Duration::from_millis(8), devices: 1 };
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
        assert_eq!(shed.reason, ShedReason::Requests);
        assert!((Duration::from_millis(6)..=Duration::from_millis(10)).contains(&shed.retry_after), "{:?}", shed.retry_after);
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

    #[test]
    fn whoever_would_wait_in_vain_is_told_when_to_come_back() {
        let admission = admission(100, 1000, 100_000);
        let caller = |peer: &str| Caller { named: None, peer: Some(peer.into()) };
        let ask = |peer: &str, patience: u64| admission.admit_of(&caller(peer), 0, Some(Duration::from_secs(patience)));
        let flood = ask("flood", 1).expect("nothing is ahead");
        flood.charge(10_000).expect("room");
        ask("flood", 1).expect("nobody knows how fast the device is");
        // It scores a thousand tokens a second.
        for _ in 0..4 {
            ask("flood", 1).expect("nobody knows how fast the device is");
            lock(&admission.0.metrics.pace).observe(1000, Duration::from_secs(1));
        }
        let shed = ask("flood", 12).expect_err("ten seconds are ahead, and the caller's own");
        assert_eq!(shed.reason, ShedReason::Deadline);
        assert!((7500..=12_500).contains(&shed.retry_after.as_millis()), "{:?}", shed.retry_after);
        assert!(ask("flood", 17).is_ok());
        assert!(admission.admit_of(&caller("flood"), 0, None).is_ok(), "who waits for ever is in time");
        let other = ask("other", 1).expect("tenants take turns");
        other.charge(100).expect("room");
        other.in_time(Some(Duration::from_secs(1))).expect("a hundred tokens of each are ahead");
        assert_eq!(reason(flood.in_time(Some(Duration::from_secs(1)))), ShedReason::Deadline);
        flood.scored(0);
        assert!(ask("flood", 1).is_ok(), "what is done is not ahead any more");
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
            prop_assert_eq!(lock(&admission.0.state).shares.all(), Held::default());
        }
    }
}
