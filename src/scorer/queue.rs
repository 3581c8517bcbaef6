//! What runs next: the pure policy of the device queue. Time comes in as an argument.
//!
//! Highest priority first, then arrival. Ageing makes one level of priority worth a head start of a fixed time (the
//! queue's `ageing`): a job of priority `p` that arrives at `t` is ordered as if it had arrived at `t - p * ageing`. So
//! the order of two jobs never changes while they wait, and nobody starves: a job is overtaken only by those that arrive
//! at most `(difference in priority) * ageing` after it.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// The priorities that count; what lies outside counts as the nearest of them.
pub const PRIORITIES: RangeInclusive<i32> = -100..=100;

/// Names a job within one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(u64);

/// What the policy has to know of a job.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Samples of different lanes never share a pack.
    pub lane: u64,
    /// Higher first.
    pub priority: i32,
    pub arrived: Instant,
    /// Samples that are still queued at this time expire.
    pub deadline: Option<Instant>,
    /// Tokens of each sample, in order; at least one sample.
    pub tokens: Vec<usize>,
}

/// What the queue holds at most. An empty queue takes any one job, so that none is refused for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBounds {
    pub max_samples: usize,
    pub max_tokens: usize,
}

/// What a pack holds at most. A single sample above the token budget, which the limits of samples rule out, would get a
/// pack of its own rather than block the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackLimits {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Jobs that nobody waits for; what was left of them left the queue.
    pub cancelled: Vec<JobId>,
}

impl Draw {
    pub fn is_empty(&self) -> bool {
        self.picks.is_empty() && self.expired.is_empty() && self.cancelled.is_empty()
    }

    /// Tokens of the pack.
    pub fn tokens(&self) -> usize {
        self.picks.iter().map(|pick| pick.tokens).sum()
    }
}

/// Virtual arrival in nanoseconds, then the order of arrival.
type Key = (i128, JobId);

#[derive(Debug)]
struct Waiting {
    lane: u64,
    deadline: Option<Instant>,
    tokens: Vec<usize>,
    /// The first sample that has not been given out.
    next: usize,
}

impl Waiting {
    fn rest(&self, job: JobId) -> impl Iterator<Item = Pick> + '_ {
        self.tokens.iter().enumerate().skip(self.next).map(move |(sample, &tokens)| Pick { job, sample, tokens })
    }
}

/// The queue of one device.
#[derive(Debug)]
pub struct Queue {
    bounds: QueueBounds,
    ageing: Duration,
    origin: Option<Instant>,
    next_id: u64,
    order: BTreeMap<Key, Waiting>,
    keys: HashMap<JobId, Key>,
    samples: usize,
    tokens: usize,
}

impl Queue {
    /// `ageing` is what one level of priority is worth in time of arrival.
    pub fn new(bounds: QueueBounds, ageing: Duration) -> Self {
        Self { bounds, ageing, origin: None, next_id: 0, order: BTreeMap::new(), keys: HashMap::new(), samples: 0, tokens: 0 }
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
        self.order.is_empty()
    }

    /// Takes a job in, whole or not at all.
    pub fn push(&mut self, job: NewJob) -> Result<JobId, QueueFull> {
        let tokens: usize = job.tokens.iter().sum();
        let full = self.samples + job.tokens.len() > self.bounds.max_samples || self.tokens + tokens > self.bounds.max_tokens;
        if full && !self.is_empty() {
            return Err(QueueFull { samples: self.samples, tokens: self.tokens });
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        let origin = *self.origin.get_or_insert(job.arrived);
        let arrived = job.arrived.saturating_duration_since(origin).as_nanos() as i128;
        let priority = job.priority.clamp(*PRIORITIES.start(), *PRIORITIES.end());
        let key = (arrived - i128::from(priority) * self.ageing.as_nanos() as i128, id);
        if !job.tokens.is_empty() {
            self.samples += job.tokens.len();
            self.tokens += tokens;
            self.keys.insert(id, key);
            self.order.insert(key, Waiting { lane: job.lane, deadline: job.deadline, tokens: job.tokens, next: 0 });
        }
        Ok(id)
    }

    /// Drops what is left of a job; nothing happens if nothing is.
    pub fn remove(&mut self, job: JobId) {
        self.take(job);
    }

    /// Removes what nobody waits for and what came too late, then gives out the next pack: the lane of the first job in
    /// order, and jobs of this lane in order until the next sample does not fit.
    pub fn next_pack(&mut self, now: Instant, limits: PackLimits, cancelled: impl FnMut(JobId) -> bool) -> Draw {
        let mut draw = self.sweep(now, cancelled);
        let Some(lane) = self.order.values().next().map(|job| job.lane) else { return draw };
        let (mut used, mut finished) = (0, Vec::new());
        'pack: for (&(_, id), job) in self.order.iter_mut().filter(|(_, job)| job.lane == lane) {
            while let Some(&tokens) = job.tokens.get(job.next) {
                let fits = used + tokens <= limits.max_tokens && draw.picks.len() < limits.max_samples;
                if !fits && !draw.picks.is_empty() {
                    break 'pack;
                }
                used += tokens;
                draw.picks.push(Pick { job: id, sample: job.next, tokens });
                job.next += 1;
            }
            finished.push(id);
        }
        self.samples -= draw.picks.len();
        self.tokens -= used;
        for job in finished {
            self.take(job);
        }
        draw
    }

    /// Removes cancelled jobs and expired samples. Part of [`Queue::next_pack`]; on its own, it makes room.
    pub fn sweep(&mut self, now: Instant, mut cancelled: impl FnMut(JobId) -> bool) -> Draw {
        let mut draw = Draw::default();
        let mut late = Vec::new();
        for (&(_, id), job) in &self.order {
            if cancelled(id) {
                draw.cancelled.push(id);
            } else if job.deadline.is_some_and(|deadline| deadline <= now) {
                late.push(id);
            }
        }
        for &id in &draw.cancelled {
            self.take(id);
        }
        for id in late {
            if let Some(job) = self.take(id) {
                draw.expired.extend(job.rest(id));
            }
        }
        draw
    }

    fn take(&mut self, id: JobId) -> Option<Waiting> {
        let job = self.keys.remove(&id).and_then(|key| self.order.remove(&key))?;
        self.samples -= job.tokens.len() - job.next;
        self.tokens -= job.tokens[job.next..].iter().sum::<usize>();
        Some(job)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
