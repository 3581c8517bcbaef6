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

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The priorities that count; what lies outside counts as the nearest of them.
pub const PRIORITIES: RangeInclusive<i32> = -100..=100;
/// A turn is this part of a pack: small enough that a pack has room for several tenants, large enough for a group of
/// completions.
const TURNS_PER_PACK: usize = 4;
/// Tenants without jobs that are remembered for their debts, at most.
const MAX_DEBTORS: usize = 4096;

/// Names a job within one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

/// What one sample asks of the queue and of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub tokens: usize,
    /// What it costs a pack, in tokens, if nothing of it is shared.
    pub whole: usize,
    /// What it costs if the sample before it in its job is in the same pack.
    pub fresh: usize,
}

impl Load {
    /// A sample that shares nothing and costs its tokens.
    pub fn plain(tokens: usize) -> Self {
        Self { tokens, whole: tokens, fresh: tokens }
    }
}

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
    /// What its samples may cost, in tokens.
    pub max_tokens: usize,
    pub max_samples: usize,
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
    /// What the picks cost together, in tokens.
    pub cost: usize,
}

impl Draw {
    pub fn is_empty(&self) -> bool {
        self.picks.is_empty() && self.expired.is_empty()
    }
}

/// Virtual arrival in nanoseconds, then the order in which jobs were given this place.
type Key = (i128, u64);

#[derive(Debug)]
struct Waiting {
    lane: u64,
    tenant: Arc<str>,
    key: Key,
    priority: i32,
    deadline: Option<Instant>,
    samples: Vec<Load>,
    /// The first sample that has not been given out.
    next: usize,
    /// The last pack that it gave a sample to.
    pack: u64,
    /// What it has taken of packs since it was given its place: what its samples cost, and the room that was too small for
    /// the next of them.
    given: usize,
}

#[derive(Debug)]
struct Tenant {
    /// Its place in the line.
    turn: u64,
    /// Tokens that it may still give out in its turn; none before its first. Below zero where the last sample was larger
    /// than what was left: the next turn is shorter by that.
    credit: Option<i64>,
    /// Its jobs by lane, in order.
    lanes: BTreeMap<u64, BTreeMap<Key, JobId>>,
}

impl Tenant {
    fn owes(&self) -> bool {
        self.credit.is_some_and(|credit| credit < 0)
    }

    /// The lane of the first of its jobs.
    fn first_lane(&self) -> Option<u64> {
        self.lanes.iter().filter_map(|(lane, jobs)| Some((jobs.first_key_value()?.0, *lane))).min().map(|(_, lane)| lane)
    }
}

/// How a turn ended.
enum Turn {
    /// The pack is full; the turn goes on with the next one.
    Full,
    /// The tenant has nothing of this lane.
    Nothing,
    Over,
}

/// The queue of one device.
#[derive(Debug)]
pub struct Queue {
    bounds: QueueBounds,
    ageing: Duration,
    origin: Option<Instant>,
    /// Numbers for jobs, places and turns.
    serial: u64,
    packs: u64,
    jobs: HashMap<JobId, Waiting>,
    tenants: HashMap<Arc<str>, Tenant>,
    /// Tenants that have jobs or debts, in the order of their turns.
    line: BTreeMap<u64, Arc<str>>,
    deadlines: BTreeSet<(Instant, JobId)>,
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
            deadlines: BTreeSet::new(),
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

    /// Takes a job in, whole or not at all.
    pub fn push(&mut self, job: NewJob) -> Result<JobId, QueueFull> {
        let tokens: usize = job.samples.iter().map(|load| load.tokens).sum();
        let full = self.samples + job.samples.len() > self.bounds.max_samples || self.tokens + tokens > self.bounds.max_tokens;
        if full && !self.is_empty() {
            return Err(QueueFull { samples: self.samples, tokens: self.tokens });
        }
        let priority = job.priority.clamp(*PRIORITIES.start(), *PRIORITIES.end());
        let key = self.key(priority, job.arrived);
        let id = JobId(key.1);
        if job.samples.is_empty() {
            return Ok(id);
        }
        self.samples += job.samples.len();
        self.tokens += tokens;
        if let Some(deadline) = job.deadline {
            self.deadlines.insert((deadline, id));
        }
        if !self.tenants.contains_key(&job.tenant) {
            let turn = self.number();
            self.line.insert(turn, job.tenant.clone());
            self.tenants.insert(job.tenant.clone(), Tenant { turn, credit: None, lanes: BTreeMap::new() });
        }
        if let Some(tenant) = self.tenants.get_mut(&job.tenant) {
            tenant.lanes.entry(job.lane).or_default().insert(key, id);
        }
        let NewJob { lane, tenant, deadline, samples, .. } = job;
        self.jobs.insert(id, Waiting { lane, tenant, key, priority, deadline, samples, next: 0, pack: 0, given: 0 });
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

    /// Removes what came too late, then gives out the next pack: in the lane of the first job of the tenant whose turn it
    /// is, turn by turn, until the next sample does not fit.
    pub fn next_pack(&mut self, now: Instant, limits: PackLimits) -> Draw {
        let mut draw = Draw { expired: self.expire(now), ..Draw::default() };
        self.packs += 1;
        if self.is_empty() {
            // Nobody waits for what is owed.
            self.tenants.clear();
            self.line.clear();
        }
        let (mut lane, mut from) = (None, 0);
        while let Some((&turn, name)) = self.line.range(from..).next() {
            let name = name.clone();
            match self.turn(&name, &mut lane, now, limits, &mut draw) {
                Turn::Full => break,
                Turn::Nothing => from = turn + 1,
                Turn::Over => self.move_to_the_end(&name, limits),
            }
        }
        draw.picks.sort_unstable();
        draw
    }

    /// What one tenant gives to the pack.
    fn turn(&mut self, name: &Arc<str>, lane: &mut Option<u64>, now: Instant, limits: PackLimits, draw: &mut Draw) -> Turn {
        let share = share(limits);
        let mut given = false;
        loop {
            let Some(tenant) = self.tenants.get_mut(name).filter(|tenant| !tenant.lanes.is_empty()) else { return Turn::Over };
            let Some(here) = lane.or_else(|| tenant.first_lane()) else { return Turn::Nothing };
            let Some((&key, &id)) = tenant.lanes.get(&here).and_then(BTreeMap::first_key_value) else {
                return if given { Turn::Over } else { Turn::Nothing };
            };
            let Some(job) = self.jobs.get_mut(&id) else { return Turn::Over };
            if job.given >= limits.max_tokens && job.pack < self.packs {
                self.move_back(name, key, id, now);
                continue;
            }
            let credit = tenant.credit.get_or_insert(share);
            while let Some(&load) = job.samples.get(job.next) {
                let beside = job.pack == self.packs;
                // A turn does not end between samples that have more in common than apart.
                if *credit <= 0 && !(beside && 2 * load.fresh <= load.whole) {
                    return Turn::Over;
                }
                let cost = if beside { load.fresh } else { load.whole };
                let fits = draw.cost + cost <= limits.max_tokens && draw.picks.len() < limits.max_samples;
                if !fits && !draw.picks.is_empty() {
                    if beside {
                        job.given += limits.max_tokens.saturating_sub(draw.cost);
                    }
                    return Turn::Full;
                }
                *lane = Some(here);
                given = true;
                draw.cost += cost;
                draw.picks.push(Pick { job: id, sample: job.next, tokens: load.tokens });
                *credit = credit.saturating_sub_unsigned(cost as u64);
                self.samples -= 1;
                self.tokens -= load.tokens;
                job.next += 1;
                job.pack = self.packs;
                job.given += cost;
            }
            self.take(id);
        }
    }

    /// The job goes on as if it had arrived now.
    fn move_back(&mut self, name: &Arc<str>, old: Key, id: JobId, now: Instant) {
        let Some((priority, lane)) = self.jobs.get(&id).map(|job| (job.priority, job.lane)) else { return };
        let key = self.key(priority, now);
        if let Some(jobs) = self.tenants.get_mut(name).and_then(|tenant| tenant.lanes.get_mut(&lane)) {
            jobs.remove(&old);
            jobs.insert(key, id);
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            (job.key, job.given) = (key, 0);
        }
    }

    /// The tenant stands at the end of the line, with what it may give out in its next turn; or leaves, if it has nothing to
    /// give out and owes nothing.
    fn move_to_the_end(&mut self, name: &Arc<str>, limits: PackLimits) {
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
        let job = self.jobs.remove(&id)?;
        self.samples -= job.samples.len() - job.next;
        self.tokens -= job.samples[job.next..].iter().map(|load| load.tokens).sum::<usize>();
        if let Some(deadline) = job.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        // What it gave out before its turn is not given to it anew. Those that have jobs are no more than these.
        let room = self.tenants.len() <= self.jobs.len() + MAX_DEBTORS;
        if let Some(tenant) = self.tenants.get_mut(&job.tenant) {
            if let Some(jobs) = tenant.lanes.get_mut(&job.lane) {
                jobs.remove(&job.key);
                if jobs.is_empty() {
                    tenant.lanes.remove(&job.lane);
                }
            }
            if tenant.lanes.is_empty() && !(tenant.credit.is_some() && room) {
                self.forget(&job.tenant);
            }
        }
        Some(job)
    }

    fn forget(&mut self, name: &Arc<str>) {
        if let Some(tenant) = self.tenants.remove(name) {
            self.line.remove(&tenant.turn);
        }
    }
}

/// What a tenant gives out in one turn.
fn share(limits: PackLimits) -> i64 {
    i64::try_from(limits.max_tokens.div_ceil(TURNS_PER_PACK)).unwrap_or(i64::MAX).max(1)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
