//! The device worker: an actor on an OS thread that owns its device. Queue, pack, forward, reply. Several devices have a
//! worker each, and all of them take from one queue.
//!
//! It never waits for more work to come: an idle device starts on whatever there is, and what arrives meanwhile makes the
//! next pack. While the device is busy the worker makes the next pack ready, if there is enough to fill it: a pack that
//! has room left is better filled by what arrives in the meantime. Each submission is answered once, when its last sample
//! is done.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::RandomState;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use opentelemetry::trace::TraceContextExt;
use tokio::sync::watch;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::budget::Budget;
use super::forward::{Drawn, Forwarded, Lost, Next, forward};
use super::line::{Job, ScorerHandle, Shared, State, answer_all};
use super::priority::stand_back;
use super::{Draw, PackLimits, Queue, QueueBounds, ScorerError, ScorerMetrics, ScorerOptions};
use crate::clock::Clock;
use crate::lock::lock;

/// The one that owns a device. [`spawn`] gives it a thread; a test steps it by hand.
pub struct Worker {
    shared: Arc<Shared>,
    /// Which of the devices.
    device: usize,
    budget: Budget,
    /// The device answers no more, so nothing else is tried.
    lost: bool,
    pool: Option<rayon::ThreadPool>,
}

/// A handle and its worker, which does nothing by itself and runs forwards on the thread that steps it.
pub fn pair(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> (ScorerHandle, Worker) {
    let (handle, shared) = line(ScorerOptions { devices: 1, ..options }, clock, metrics);
    (handle, Worker::new(shared, 0))
}

/// [`pair`] with a worker for every device.
pub fn crew(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> (ScorerHandle, Vec<Worker>) {
    let (handle, shared) = line(options, clock, metrics);
    (handle, (0..options.devices).map(|device| Worker::new(shared.clone(), device)).collect())
}

fn line(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> (ScorerHandle, Arc<Shared>) {
    metrics.max_pack_tokens.set(i64::try_from(options.max_pack_tokens).unwrap_or(i64::MAX));
    metrics.devices.set(i64::try_from(options.devices).unwrap_or(i64::MAX));
    let bounds = QueueBounds { max_samples: options.max_queue_samples, max_tokens: options.max_queue_tokens };
    let queue = Queue::new(bounds, options.ageing);
    let state = State { queue, jobs: HashMap::new(), ahead: VecDeque::new(), workers: options.devices, gone: false, hung_up: false };
    let (gone, _) = watch::channel(false);
    let max_pack_tokens = AtomicUsize::new(options.max_pack_tokens);
    let (state, wake, hashes) = (Mutex::new(state), Condvar::new(), RandomState::new());
    let shared = Arc::new(Shared { options, clock, metrics, state, wake, hashes, gone, max_pack_tokens });
    (ScorerHandle::new(shared.clone()), shared)
}

/// Starts every worker on a thread of its own, with a pool of its own for the forwards. The threads end when the last
/// handle is dropped and the queue is empty.
pub fn spawn(
    options: ScorerOptions,
    clock: Clock,
    metrics: ScorerMetrics,
) -> std::io::Result<(ScorerHandle, Vec<std::thread::JoinHandle<()>>)> {
    let (handle, workers) = crew(options, clock, metrics);
    let mut threads = Vec::with_capacity(workers.len());
    for mut worker in workers {
        let device = worker.device;
        let name = move |thread: usize| if device == 0 { format!("warm-device-{thread}") } else { format!("warm-device{device}-{thread}") };
        let behind = move |_| stand_back(options.nice);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).thread_name(name).start_handler(behind).build();
        worker.pool = Some(pool.map_err(std::io::Error::other)?);
        let name = if device == 0 { "warm-device".to_owned() } else { format!("warm-device{device}") };
        threads.push(std::thread::Builder::new().name(name).spawn(move || worker.run())?);
    }
    Ok((handle, threads))
}

impl Worker {
    fn new(shared: Arc<Shared>, device: usize) -> Self {
        let budget = Budget::new(shared.options.max_pack_tokens);
        Self { shared, device, budget, lost: false, pool: None }
    }

    /// Settles what is expired and runs one pack; false if there was nothing to do. Never waits.
    pub fn step(&mut self) -> bool {
        if self.lost {
            return false;
        }
        let ahead = lock(&self.shared.state).ahead.pop_front();
        if let Some(next) = ahead {
            if let Some(next) = self.still_wanted(next) {
                self.execute(next);
            }
            return true;
        }
        self.budget.allow(self.shared.max_pack_tokens.load(Ordering::Relaxed));
        let (drew, next) = self.draw(lock(&self.shared.state), Duration::ZERO);
        if let Some(next) = next {
            self.execute(next);
        }
        drew
    }

    /// Runs until the last handle is dropped and the queue is empty.
    pub fn run(mut self) {
        loop {
            while self.step() {}
            if self.lost {
                return;
            }
            let state = lock(&self.shared.state);
            if !state.queue.is_empty() || !state.ahead.is_empty() {
                continue;
            }
            if state.hung_up {
                return;
            }
            // Woken by chance, it finds nothing to do and waits again.
            drop(self.shared.wake.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()));
        }
    }

    /// The next pack, for a device that has time after `wait`.
    fn draw(&self, mut guard: MutexGuard<'_, State>, wait: Duration) -> (bool, Option<Next>) {
        let (shared, now) = (&self.shared, self.shared.clock.now());
        let state = &mut *guard;
        let draw = state.queue.next_pack(now, self.limits(wait));
        let closed = shared.settle(state, &draw.expired);
        shared.show_depth(state);
        let drew = !draw.is_empty();
        let found = found(draw, state, &shared.metrics, now);
        let more = !state.queue.is_empty();
        drop(guard);
        if more {
            // There may be another device that waits.
            shared.wake.notify_one();
        }
        answer_all(closed, now);
        (drew, found.map(Next::new))
    }

    /// Makes the next pack ready, if what waits fills one, while this one runs.
    fn collate(&self, running: &Next) {
        let state = lock(&self.shared.state);
        let wait = state.queue.paces.duration(running.drawn.lane, running.drawn.cost).unwrap_or_default();
        if state.ahead.len() >= state.workers || !state.queue.fills(self.shared.clock.now(), self.limits(wait)) {
            return;
        }
        if let (_, Some(next)) = self.draw(state, wait) {
            next.prepare(self.device);
            lock(&self.shared.state).ahead.push_back(next);
            // Another device may have come to its end meanwhile.
            self.shared.wake.notify_one();
        }
    }

    fn limits(&self, wait: Duration) -> PackLimits {
        PackLimits { max_tokens: self.budget.tokens(), max_samples: self.shared.options.max_pack_samples, wait }
    }

    /// A pack that was made ready, without what has become too late or been withdrawn since.
    fn still_wanted(&self, next: Next) -> Option<Next> {
        let now = self.shared.clock.now();
        let mut guard = lock(&self.shared.state);
        let state = &mut *guard;
        let late = |job: &Job| job.submission.deadline.is_some_and(|deadline| deadline <= now);
        let (mut kept, mut expired) = (HashSet::new(), Vec::new());
        for pick in &next.drawn.picks {
            match state.jobs.get(&pick.job) {
                Some(job) if job.abandoned => {}
                Some(job) if late(job) => expired.push(*pick),
                None => {}
                Some(_) => {
                    kept.insert(*pick);
                }
            }
        }
        if kept.len() == next.drawn.picks.len() {
            return Some(next);
        }
        let closed = self.shared.settle(state, &expired);
        drop(guard);
        answer_all(closed, now);
        (!kept.is_empty()).then(|| Next::new(next.drawn.only(|pick| kept.contains(pick))))
    }

    fn execute(&mut self, next: Next) {
        let (shared, started) = (self.shared.clone(), self.shared.clock.now());
        let device = self.device;
        let run = || next.drawn.span.in_scope(|| forward(&next, device, &shared.metrics));
        lock(&shared.state).start(&next.drawn.picks);
        let result = match &self.pool {
            None => {
                self.collate(&next);
                run()
            }
            Some(pool) => {
                let mut result = Err(Lost("its threads have ended".to_owned()));
                pool.in_place_scope(|scope| {
                    scope.spawn(|_| result = run());
                    self.collate(&next);
                });
                result
            }
        };
        let ended = shared.clock.now();
        let took = ended.saturating_duration_since(started);
        shared.metrics.forward_seconds.observe(took.as_secs_f64());
        let mut guard = lock(&shared.state);
        let state = &mut *guard;
        state.stop(&next.drawn.picks, took);
        let (mut closed, mut failed) = (Vec::new(), Vec::new());
        let room = match result {
            Ok(Forwarded { outcomes, largest, misfits, cost }) => {
                if let Some(cost) = cost {
                    state.queue.paces.observe(next.drawn.lane, next.drawn.cost, cost, took);
                    // What admission counts are tokens, whoever is asked to score them.
                    let each = took.div_f64(next.drawn.models.len().max(1) as f64);
                    lock(&shared.metrics.pace).observe(next.drawn.tokens(), each);
                }
                for (pick, outcome) in next.drawn.picks.iter().zip(outcomes) {
                    match outcome {
                        Ok(outputs) => closed.extend(state.record(*pick, Ok(outputs))),
                        // The rest of its request would be scored for nothing.
                        Err(problem) => failed.extend(state.withdraw(*pick).map(|job| (job, problem))),
                    }
                }
                Some((largest, misfits))
            }
            Err(Lost(problem)) => {
                for pick in &next.drawn.picks {
                    failed.extend(state.withdraw(*pick).map(|job| (job, problem.clone())));
                }
                None
            }
        };
        shared.show_depth(state);
        drop(guard);
        answer_all(closed, ended);
        for (job, problem) in failed {
            job.fail(ScorerError::Forward(problem));
        }
        match room {
            Some((largest, misfits)) => self.learn(&next, largest, misfits),
            None => self.lost = true,
        }
    }

    /// What a forward says of the room on the device.
    fn learn(&mut self, next: &Next, largest: usize, misfits: usize) {
        if misfits == 0 {
            self.budget.fits();
            return;
        }
        let whole = next.drawn.tokens();
        let lower = self.budget.lower(largest, whole);
        let tokens = self.budget.tokens();
        tracing::warn!(device = self.device, whole, largest, lower, max_pack_tokens = tokens, "the device had no room for a pack");
        self.shared.metrics.max_pack_tokens.set(i64::try_from(tokens).unwrap_or(i64::MAX));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.workers -= 1;
        // One that ends in its time leaves the jobs of the others alone.
        if state.hung_up && !self.lost && !std::thread::panicking() && state.workers > 0 {
            return;
        }
        // Dropping the jobs tells every caller that nobody will answer.
        state.gone = true;
        let (jobs, ahead) = (std::mem::take(&mut state.jobs), std::mem::take(&mut state.ahead));
        for id in jobs.keys() {
            state.queue.remove(*id);
        }
        self.shared.show_depth(&state);
        drop(state);
        drop((jobs, ahead));
        self.shared.gone.send_replace(true);
    }
}

/// What was picked, as the jobs have it.
fn found(draw: Draw, state: &mut State, metrics: &ScorerMetrics, now: Instant) -> Option<Drawn> {
    let Draw { picks, cost, computed, .. } = draw;
    let first = state.jobs.get(&picks.first()?.job)?;
    let (lane, models) = (first.submission.lane, first.submission.models.clone());
    let tokens: usize = picks.iter().map(|pick| pick.tokens).sum();
    // Many requests ride in a pack; it stands in the trace of the first one that is traced, and the others refer to it.
    let traced = picks.iter().filter_map(|pick| state.jobs.get(&pick.job)).find(|job| is_traced(&job.submission.span));
    let parent = traced.and_then(|job| job.submission.span.id());
    let span = tracing::debug_span!(parent: parent, "pack", lane, samples = picks.len(), tokens);
    let mut encodings = Vec::with_capacity(picks.len());
    let mut last = None;
    for pick in &picks {
        let job = state.jobs.get_mut(&pick.job)?;
        drop(job.queued.take());
        encodings.push(job.submission.encodings[pick.sample].clone());
        if last.replace(pick.job) != Some(pick.job) {
            span.follows_from(&job.submission.span);
            metrics.queue_seconds.observe(now.saturating_duration_since(job.arrived).as_secs_f64());
        }
    }
    Some(Drawn { lane, cost, computed, picks, models, encodings, span })
}

/// Whether somebody is told of what happens in this span.
fn is_traced(span: &tracing::Span) -> bool {
    !span.is_disabled() && span.context().span().span_context().is_sampled()
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
