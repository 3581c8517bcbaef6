//! The device worker: an actor on an OS thread that owns the device. Queue, pack, forward, reply.
//!
//! It never waits for more work to come: an idle device starts on whatever there is, and what arrives meanwhile makes the
//! next pack. While the device is busy the worker makes the next pack ready, if there is enough to fill it: a pack that
//! has room left is better filled by what arrives in the meantime. Each submission is answered once, when its last sample
//! is done.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use super::line::{Job, ScorerHandle, Shared, State, answer_all};
use super::{PackLimits, Pick, Queue, QueueBounds, ScorerError, ScorerMetrics, ScorerOptions, lock};
use crate::clock::Clock;
use crate::model::{Output, Pack, RewardModel};
use crate::text::Encoding;

/// The one that owns the device. [`spawn`] gives it a thread; a test steps it by hand.
pub struct Worker {
    shared: Arc<Shared>,
    pool: Option<rayon::ThreadPool>,
    /// A full pack that was made ready while the device was busy.
    ahead: Option<Next>,
}

/// A handle and its worker, which does nothing by itself and runs forwards on the thread that steps it.
pub fn pair(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> (ScorerHandle, Worker) {
    metrics.max_pack_tokens.set(i64::try_from(options.max_pack_tokens).unwrap_or(i64::MAX));
    let bounds = QueueBounds { max_samples: options.max_queue_samples, max_tokens: options.max_queue_tokens };
    let state = State { queue: Queue::new(bounds, options.ageing), jobs: HashMap::new(), gone: false, hung_up: false };
    let shared = Arc::new(Shared { options, clock, metrics, state: Mutex::new(state), wake: Condvar::new() });
    (ScorerHandle::new(shared.clone()), Worker { shared, pool: None, ahead: None })
}

/// Starts the worker on a thread of its own, with a pool of its own for the forwards. The thread ends when the last
/// handle is dropped and the queue is empty.
pub fn spawn(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> std::io::Result<(ScorerHandle, std::thread::JoinHandle<()>)> {
    let (handle, mut worker) = pair(options, clock, metrics);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .thread_name(|i| format!("warm-device-{i}"))
        .start_handler(move |_| stand_back(options.nice))
        .build();
    worker.pool = Some(pool.map_err(std::io::Error::other)?);
    let thread = std::thread::Builder::new().name("warm-device".to_owned()).spawn(move || worker.run())?;
    Ok((handle, thread))
}

/// Lowers the priority of this thread. Where that cannot be done it computes all the same.
#[cfg(target_os = "linux")]
fn stand_back(nice: u8) {
    // On Linux these are of the calling thread alone.
    use rustix::process::{getpriority_process, setpriority_process};
    if let Ok(now) = getpriority_process(None)
        && nice > 0
        && let Err(error) = setpriority_process(None, (now + i32::from(nice)).min(19))
    {
        tracing::debug!(%error, "the priority of a compute thread stays as it is");
    }
}

#[cfg(not(target_os = "linux"))]
fn stand_back(_: u8) {}

/// A pack to run, and whose samples it holds.
struct Next {
    picks: Vec<Pick>,
    models: Arc<[Arc<dyn RewardModel>]>,
    encodings: Vec<Arc<Encoding>>,
    /// `Err`: why it could not be made.
    pack: Result<Pack, String>,
    span: tracing::Span,
}

impl Next {
    fn new(picks: Vec<Pick>, models: Arc<[Arc<dyn RewardModel>]>, encodings: Vec<Arc<Encoding>>, span: tracing::Span) -> Self {
        // The models of a lane are of one architecture, so what may be shared is the same for all of them.
        let make = || Pack::forest(&encodings, |tokens| models.first()?.prefix_key(tokens));
        let pack = catch_unwind(AssertUnwindSafe(make)).map_err(|panic| format!("packing panicked: {}", panic_message(panic.as_ref())));
        Self { picks, models, encodings, pack, span }
    }
}

impl Worker {
    /// Settles what is expired and runs one pack; false if there was nothing to do. Never waits.
    pub fn step(&mut self) -> bool {
        if let Some(next) = self.ahead.take() {
            if let Some(next) = self.still_wanted(next) {
                self.execute(next);
            }
            return true;
        }
        let (drew, next) = self.draw(lock(&self.shared.state));
        if let Some(next) = next {
            self.execute(next);
        }
        drew
    }

    /// Runs until the last handle is dropped and the queue is empty.
    pub fn run(mut self) {
        loop {
            while self.step() {}
            let state = lock(&self.shared.state);
            if !state.queue.is_empty() {
                continue;
            }
            if state.hung_up {
                return;
            }
            // Woken by chance, it finds nothing to do and waits again.
            drop(self.shared.wake.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()));
        }
    }

    fn draw(&self, mut guard: MutexGuard<'_, State>) -> (bool, Option<Next>) {
        let (shared, now) = (&self.shared, self.shared.clock.now());
        let limits = PackLimits { max_tokens: shared.options.max_pack_tokens, max_samples: shared.options.max_pack_samples };
        let state = &mut *guard;
        let draw = state.queue.next_pack(now, limits);
        let closed = shared.settle(state, &draw.expired);
        shared.show_depth(state);
        let drew = !draw.is_empty();
        let found = found(draw.picks, state, &shared.metrics, now);
        drop(guard);
        answer_all(closed, now);
        (drew, found.map(|(picks, models, encodings, span)| Next::new(picks, models, encodings, span)))
    }

    /// The next pack, if what waits fills one.
    fn collate(&self) -> Option<Next> {
        let state = lock(&self.shared.state);
        if state.queue.tokens() < self.shared.options.max_pack_tokens { None } else { self.draw(state).1 }
    }

    /// A pack that was made ready, without what has become too late or been withdrawn since.
    fn still_wanted(&self, next: Next) -> Option<Next> {
        let now = self.shared.clock.now();
        let mut guard = lock(&self.shared.state);
        let state = &mut *guard;
        let late = |job: &Job| job.submission.deadline.is_some_and(|deadline| deadline <= now);
        let (mut kept, mut expired) = (Vec::new(), Vec::new());
        for (index, pick) in next.picks.iter().enumerate() {
            match state.jobs.get(&pick.job) {
                Some(job) if late(job) => expired.push(*pick),
                Some(_) => kept.push(index),
                None => {}
            }
        }
        if kept.len() == next.picks.len() {
            return Some(next);
        }
        let closed = self.shared.settle(state, &expired);
        drop(guard);
        answer_all(closed, now);
        let Next { picks, models, encodings, span, .. } = next;
        let picks: Vec<Pick> = kept.iter().map(|&index| picks[index]).collect();
        let encodings = kept.iter().map(|&index| encodings[index].clone()).collect();
        (!picks.is_empty()).then(|| Next::new(picks, models, encodings, span))
    }

    fn execute(&mut self, next: Next) {
        let (shared, started) = (self.shared.clone(), self.shared.clock.now());
        let run = || next.span.in_scope(|| forward(&next, &shared.metrics));
        let result = match &self.pool {
            None => {
                self.ahead = self.collate();
                run()
            }
            Some(pool) => {
                let (mut result, mut ahead) = (Err("the device's threads have ended".to_owned()), None);
                pool.in_place_scope(|scope| {
                    scope.spawn(|_| result = run());
                    ahead = self.collate();
                });
                self.ahead = ahead;
                result
            }
        };
        let ended = shared.clock.now();
        let took = ended.saturating_duration_since(started);
        shared.metrics.forward_seconds.observe(took.as_secs_f64());
        let mut guard = lock(&shared.state);
        let state = &mut *guard;
        let mut last = None;
        for pick in &next.picks {
            if last.replace(pick.job) != Some(pick.job)
                && let Some(job) = state.jobs.get_mut(&pick.job)
            {
                job.forward += took;
            }
        }
        let mut closed = Vec::new();
        match result {
            Ok(outputs) => {
                for (pick, outputs) in next.picks.iter().zip(outputs) {
                    closed.extend(state.record(*pick, Ok(outputs)));
                }
                drop(guard);
                answer_all(closed, ended);
            }
            Err(problem) => {
                // The rest of these requests would be scored for nothing.
                for pick in &next.picks {
                    state.queue.remove(pick.job);
                    closed.extend(state.jobs.remove(&pick.job));
                }
                shared.show_depth(state);
                drop(guard);
                for job in closed {
                    job.fail(ScorerError::Forward(problem.clone()));
                }
            }
        }
    }
}

/// All models over one pack: per sample, one output per model.
fn forward(next: &Next, metrics: &ScorerMetrics) -> Result<Vec<Vec<Output>>, String> {
    let run = || -> Result<Vec<Vec<Output>>, String> {
        let pack = next.pack.as_ref().map_err(String::clone)?;
        let mut samples = vec![Vec::with_capacity(next.models.len()); next.encodings.len()];
        for (i, model) in next.models.iter().enumerate() {
            let _forward = tracing::debug_span!("forward", model = i).entered();
            let outputs = model.forward(pack).map_err(|error| error.to_string())?;
            if outputs.len() != samples.len() {
                return Err(format!("expected {} outputs of the model, found {}", samples.len(), outputs.len()));
            }
            for (sample, output) in samples.iter_mut().zip(outputs) {
                sample.push(output);
            }
        }
        Ok(samples)
    };
    let caught = catch_unwind(AssertUnwindSafe(run));
    let tokens = next.picks.iter().map(|pick| pick.tokens).sum::<usize>();
    metrics.pack_samples.observe(next.picks.len() as f64);
    let outcome = match &caught {
        Ok(Ok(samples)) => {
            metrics.samples.inc_by(samples.len() as u64);
            for model in 0..next.models.len() {
                let there = |sample: usize| samples[sample][model].cached_tokens;
                let computed = next.pack.as_ref().map_or(0, |pack| pack.computed_without(there));
                let cached: usize = (0..samples.len()).map(there).sum();
                if model == 0 {
                    metrics.pack_tokens.observe(computed as f64);
                }
                metrics.tokens_computed.inc_by(computed as u64);
                metrics.tokens_cached.inc_by(cached as u64);
                metrics.tokens_shared.inc_by(tokens.saturating_sub(computed + cached) as u64);
            }
            "ok"
        }
        Ok(Err(_)) => "error",
        Err(_) => "panic",
    };
    metrics.packs.with_label_values(&[outcome]).inc();
    let result = caught.unwrap_or_else(|panic| Err(format!("the forward pass panicked: {}", panic_message(panic.as_ref()))));
    if let Err(problem) = &result {
        tracing::error!(problem, samples = next.picks.len(), tokens, "a pack failed");
    }
    result
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Dropping the jobs tells every caller that nobody will answer.
        let mut state = lock(&self.shared.state);
        state.gone = true;
        let jobs = std::mem::take(&mut state.jobs);
        for id in jobs.keys() {
            state.queue.remove(*id);
        }
        self.shared.show_depth(&state);
        drop(state);
        drop(jobs);
    }
}

type Found = (Vec<Pick>, Arc<[Arc<dyn RewardModel>]>, Vec<Arc<Encoding>>, tracing::Span);

/// What was picked, as the jobs have it.
fn found(picks: Vec<Pick>, state: &State, metrics: &ScorerMetrics, now: Instant) -> Option<Found> {
    let first = state.jobs.get(&picks.first()?.job)?;
    let tokens: usize = picks.iter().map(|pick| pick.tokens).sum();
    let span = tracing::debug_span!("pack", lane = first.submission.lane, samples = picks.len(), tokens);
    let mut encodings = Vec::with_capacity(picks.len());
    let mut last = None;
    for pick in &picks {
        let job = state.jobs.get(&pick.job)?;
        encodings.push(job.submission.encodings[pick.sample].clone());
        if last.replace(pick.job) != Some(pick.job) {
            span.follows_from(&job.submission.span);
            metrics.queue_seconds.observe(now.saturating_duration_since(job.arrived).as_secs_f64());
        }
    }
    Some((picks, first.submission.models.clone(), encodings, span))
}

/// The words of a panic, where it has some.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
