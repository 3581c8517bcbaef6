//! What runs next: the pure policy of the device queue. Time comes in as an argument.
//!
//! Tenants take turns: each gives out samples until it has used up its share of a pack, and then stands at the end of the
//! line, so a flood of one tenant costs the others nothing but their turns. One that leaves keeps its place until
//! its turn is over and its debt is paid, so nothing is gained by sending one sample at a time. Within a tenant the highest
//! priority goes first, then arrival. Ageing makes one level of priority worth a head start of a fixed time (the queue's
//! `ageing`): a job of priority `p` that arrives at `t` is ordered as if it had arrived at `t - p * ageing`, so it is
//! overtaken only by those that arrive at most `(difference in priority) * ageing` after it. A job that has filled a pack,
//! to where its next sample had no room, stands, when the next one is made, as if it arrived just then: a large request is
//! spread over packs and holds up nobody.
//!
//! A pack is answered as a whole, so where its samples have deadlines it holds no more than is likely to be done in time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Load;
use super::filling::share;
use super::pace::Paces;

/// The priorities that count; what lies outside counts as the nearest of them.
pub const PRIORITIES: RangeInclusive<i32> = -100..=100;
/// A turn is this part of a pack: small enough that a pack has room for several tenants, large enough for a group of
/// completions.
pub(super) const TURNS_PER_PACK: usize = 4;
/// Tenants without jobs that are remembered for their debts, at most.
const MAX_DEBTORS: usize = 4096;

/// Names a job within one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

/// What the policy has to know of a job.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Samples of different lanes never share a pack.
    pub lane: u64,
    /// Who takes turns with whom.
    pub tenant: Arc<str>,
    /// Higher first.
    pub priority: i32,
    pub arrived: Instant,
    /// Samples that are still queued at this time expire.
    pub deadline: Option<Instant>,
    /// In order.
    pub samples: Vec<Load>,
}

/// What the queue holds at most. An empty queue takes any one job, so that none is refused for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBounds {
    pub max_samples: usize,
    pub max_tokens: usize,
}

/// What a pack holds at most. A single sample above the budget gets a pack of its own rather than block the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackLimits {
    /// Tokens that are computed, and what its samples may cost: samples that have more in common with the others than apart
    /// may bring that to twice as much.
    pub max_tokens: usize,
    pub max_samples: usize,
    /// How long it is likely to be until the device begins with it.
    pub wait: Duration,
}

/// There is no room for this job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full: it holds {samples} samples and {tokens} tokens")]
pub struct QueueFull {
    pub samples: usize,
    pub tokens: usize,
}

/// One sample of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pick {
    pub job: JobId,
    /// Index of the sample within its job.
    pub sample: usize,
    pub tokens: usize,
}

/// What the queue gives out at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draw {
    /// The samples of the next pack, those of one job side by side and in order; all of one lane.
    pub picks: Vec<Pick>,
    /// Samples whose deadline has passed; they left the queue.
    pub expired: Vec<Pick>,
    /// What the picks cost together, in tokens, at most.
    pub cost: usize,
    /// Tokens that are computed for them, at most.
    pub computed: usize,
}

impl Draw {
    pub fn is_empty(&self) -> bool {
        self.picks.is_empty() && self.expired.is_empty()
    }
}

/// Virtual arrival in nanoseconds, then the order in which jobs were given this place.
pub(super) type Key = (i128, u64);

/// Jobs in order, by what the list is of.
type Lists = BTreeMap<u64, BTreeMap<Key, JobId>>;

#[derive(Debug)]
pub(super) struct Waiting {
    pub lane: u64,
    pub tenant: Arc<str>,
    key: Key,
    priority: i32,
    pub deadline: Option<Instant>,
    pub samples: Vec<Load>,
    /// The first sample that has not been given out.
    pub next: usize,
    /// The last pack that it gave a sample to.
    pub pack: u64,
    /// What it has taken of packs since it was given its place: what its samples cost, and the room that was too small for
    /// the next of them.
    pub given: usize,
}

impl Waiting {
    /// The mark by which its next sample is found.
    fn kin(&self) -> Option<u64> {
        self.samples.get(self.next)?.kin()
    }
}

#[derive(Debug)]
pub(super) struct Tenant {
    /// Its place in the line.
    turn: u64,
    /// Tokens that it may still give out in its turn; none before its first. Below zero where the last sample was larger
    /// than what was left: the next turn is shorter by that.
    pub credit: Option<i64>,
    /// Its jobs by lane, in order.
    pub lanes: Lists,
    /// The first pack that it gave to since another lane had the first of its jobs.
    pub strayed: Option<u64>,
}

impl Tenant {
    fn owes(&self) -> bool {
        self.credit.is_some_and(|credit| credit < 0)
    }

    /// Whether it may take more than its turns give it now, and pay for that with the next ones: up to a pack.
    pub fn may_owe(&self, limits: PackLimits) -> bool {
        self.credit.is_none_or(|credit| credit.saturating_add_unsigned(limits.max_tokens as u64) > 0)
    }

    /// The first of its jobs, and its lane.
    pub fn first(&self) -> Option<(u64, JobId)> {
        let first = |(lane, jobs): (&u64, &BTreeMap<Key, JobId>)| Some((*jobs.first_key_value()?.0, *lane, *jobs.first_key_value()?.1));
        self.lanes.iter().filter_map(first).min().map(|(_, lane, id)| (lane, id))
    }
}

/// The queue of one device.
#[derive(Debug)]
pub struct Queue {
    bounds: QueueBounds,
    ageing: Duration,
    origin: Option<Instant>,
    /// Numbers for jobs, places and turns.
    serial: u64,
    pub(super) packs: u64,
    pub(super) jobs: HashMap<JobId, Waiting>,
    pub(super) tenants: HashMap<Arc<str>, Tenant>,
    /// Tenants that have jobs or debts, in the order of their turns.
    pub(super) line: BTreeMap<u64, Arc<str>>,
    /// By mark: the jobs whose next sample is akin to all that has it, in order.
    pub(super) kin: Lists,
    /// By lane: the job whose next sample had no room in the last pack, and begins the next one.
    pub(super) front: HashMap<u64, JobId>,
    deadlines: BTreeSet<(Instant, JobId)>,
    /// What packs of a certain cost took of late.
    pub(super) paces: Paces,
    samples: usize,
    tokens: usize,
}

impl Queue {
    /// `ageing` is what one level of priority is worth in time of arrival.
    pub fn new(bounds: QueueBounds, ageing: Duration) -> Self {
        Self {
            bounds,
            ageing,
            origin: None,
            serial: 0,
            packs: 0,
            jobs: HashMap::new(),
            tenants: HashMap::new(),
            line: BTreeMap::new(),
            kin: Lists::new(),
            front: HashMap::new(),
            deadlines: BTreeSet::new(),
            paces: Paces::default(),
            samples: 0,
            tokens: 0,
        }
    }

    /// Samples that wait.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Tokens that wait.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    fn number(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// Where a job stands that arrives now.
    fn key(&mut self, priority: i32, now: Instant) -> Key {
        let origin = *self.origin.get_or_insert(now);
        let arrived = now.saturating_duration_since(origin).as_nanos() as i128;
        (arrived - i128::from(priority) * self.ageing.as_nanos() as i128, self.number())
    }

    /// Whether there is room for a job as a whole.
    pub fn room_for(&self, job: &NewJob) -> Result<(), QueueFull> {
        let tokens: usize = job.samples.iter().map(|load| load.tokens).sum();
        let full = self.samples + job.samples.len() > self.bounds.max_samples || self.tokens + tokens > self.bounds.max_tokens;
        if full && !self.is_empty() { Err(QueueFull { samples: self.samples, tokens: self.tokens }) } else { Ok(()) }
    }

    /// Takes a job in, whole or not at all.
    pub fn push(&mut self, job: NewJob) -> Result<JobId, QueueFull> {
        self.room_for(&job)?;
        let priority = job.priority.clamp(*PRIORITIES.start(), *PRIORITIES.end());
        let key = self.key(priority, job.arrived);
        let id = JobId(key.1);
        if job.samples.is_empty() {
            return Ok(id);
        }
        self.samples += job.samples.len();
        self.tokens += job.samples.iter().map(|load| load.tokens).sum::<usize>();
        if let Some(deadline) = job.deadline {
            self.deadlines.insert((deadline, id));
        }
        if !self.tenants.contains_key(&job.tenant) {
            let turn = self.number();
            self.line.insert(turn, job.tenant.clone());
            self.tenants.insert(job.tenant.clone(), Tenant { turn, credit: None, lanes: Lists::new(), strayed: None });
        }
        let NewJob { lane, tenant, deadline, samples, .. } = job;
        self.jobs.insert(id, Waiting { lane, tenant, key, priority, deadline, samples, next: 0, pack: 0, given: 0 });
        self.enlist(id);
        Ok(id)
    }

    /// Drops what is left of a job; nothing happens if nothing is.
    pub fn remove(&mut self, job: JobId) {
        self.take(job);
    }

    /// Removes the samples that came too late.
    pub fn expire(&mut self, now: Instant) -> Vec<Pick> {
        let mut expired = Vec::new();
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            if let Some(job) = self.take(id) {
                let rest = job.samples.iter().enumerate().skip(job.next);
                expired.extend(rest.map(|(sample, load)| Pick { job: id, sample, tokens: load.tokens }));
            }
        }
        expired
    }

    /// Puts a job where it is to be found.
    fn enlist(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        if let Some(tenant) = self.tenants.get_mut(&job.tenant) {
            tenant.lanes.entry(job.lane).or_default().insert(job.key, id);
        }
        if let Some(mark) = job.kin() {
            self.kin.entry(mark).or_default().insert(job.key, id);
        }
    }

    fn delist(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        if let Some(tenant) = self.tenants.get_mut(&job.tenant) {
            remove_from(&mut tenant.lanes, job.lane, job.key);
        }
        if let Some(mark) = job.kin() {
            remove_from(&mut self.kin, mark, job.key);
        }
    }

    /// The next sample of a job is in the pack at hand, at this cost.
    pub(super) fn hand_over(&mut self, id: JobId, cost: usize, limits: PackLimits) {
        let Some(job) = self.jobs.get(&id) else { return };
        let strays = self.tenants.get(&job.tenant).and_then(Tenant::first).is_some_and(|(lane, _)| lane != job.lane);
        self.delist(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        self.samples -= 1;
        self.tokens -= job.samples[job.next].tokens;
        job.next += 1;
        job.pack = self.packs;
        job.given += cost;
        if let Some(tenant) = self.tenants.get_mut(&job.tenant) {
            tenant.credit = Some(tenant.credit.unwrap_or(share(limits)).saturating_sub_unsigned(cost as u64));
            tenant.strayed = if strays { tenant.strayed.or(Some(self.packs)) } else { None };
        }
        if self.front.get(&job.lane) == Some(&id) {
            self.front.remove(&job.lane);
        }
        if job.next < job.samples.len() { self.enlist(id) } else { drop(self.take(id)) }
    }

    /// The job goes on as if it had arrived now.
    pub(super) fn move_back(&mut self, id: JobId, now: Instant) {
        let Some(priority) = self.jobs.get(&id).map(|job| job.priority) else { return };
        let key = self.key(priority, now);
        self.delist(id);
        if let Some(job) = self.jobs.get_mut(&id) {
            (job.key, job.given) = (key, 0);
        }
        self.enlist(id);
    }

    /// The tenant stands at the end of the line, with what it may give out in its next turn; or leaves, if it has nothing to
    /// give out and owes nothing.
    pub(super) fn move_to_the_end(&mut self, name: &Arc<str>, limits: PackLimits) {
        let turn = self.number();
        if let Some(tenant) = self.tenants.get_mut(name) {
            if tenant.lanes.is_empty() && !tenant.owes() {
                self.forget(name);
                return;
            }
            self.line.remove(&tenant.turn);
            tenant.turn = turn;
            // Credit is not saved up, debt is.
            tenant.credit = Some(tenant.credit.unwrap_or(0).min(0).saturating_add(share(limits)));
            self.line.insert(turn, name.clone());
        }
    }

    fn take(&mut self, id: JobId) -> Option<Waiting> {
        self.delist(id);
        let job = self.jobs.remove(&id)?;
        self.samples -= job.samples.len() - job.next;
        self.tokens -= job.samples[job.next..].iter().map(|load| load.tokens).sum::<usize>();
        if let Some(deadline) = job.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if self.front.get(&job.lane) == Some(&id) {
            self.front.remove(&job.lane);
        }
        // What it gave out before its turn is not given to it anew. Those that have jobs are no more than these.
        let room = self.tenants.len() <= self.jobs.len() + MAX_DEBTORS;
        if self.tenants.get(&job.tenant).is_some_and(|tenant| tenant.lanes.is_empty() && !(tenant.credit.is_some() && room)) {
            self.forget(&job.tenant);
        }
        Some(job)
    }

    fn forget(&mut self, name: &Arc<str>) {
        if let Some(tenant) = self.tenants.remove(name) {
            self.line.remove(&tenant.turn);
        }
    }
}

fn remove_from(lists: &mut Lists, list: u64, key: Key) {
    if let Some(jobs) = lists.get_mut(&list) {
        jobs.remove(&key);
        if jobs.is_empty() {
            lists.remove(&list);
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
