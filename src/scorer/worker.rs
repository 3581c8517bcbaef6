//! The device worker: an actor on an OS thread that owns the device. Queue, pack, forward, reply.
//!
//! It never waits for more work to come: an idle device starts on whatever there is, and what arrives meanwhile makes the
//! next pack. Each submission is answered once, when its last sample is done.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::{
    Draw, JobId, NewJob, PackLimits, Pick, Queue, QueueBounds, Reply, SampleError, ScorerError, ScorerMetrics, ScorerOptions, ShedReason,
    Submission, lock,
};
use crate::clock::Clock;
use crate::model::{Output, Pack, RewardModel};
use crate::text::Encoding;

type Answer = Result<Reply, ScorerError>;

struct Job {
    submission: Submission,
    arrived: Instant,
    outcomes: Vec<Option<Result<Vec<Output>, SampleError>>>,
    open: usize,
    forward: Duration,
    reply: oneshot::Sender<Answer>,
}

struct State {
    queue: Queue,
    jobs: HashMap<JobId, Job>,
    /// The worker has ended, so nothing would be answered.
    gone: bool,
    /// The last handle has been dropped, so nothing more will come.
    hung_up: bool,
}

struct Shared {
    options: ScorerOptions,
    clock: Clock,
    metrics: ScorerMetrics,
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn show_depth(&self, state: &State) {
        self.metrics.queue_samples.set(state.queue.samples() as i64);
        self.metrics.queue_tokens.set(state.queue.tokens() as i64);
    }

    /// Settles what a draw found expired or cancelled. What comes back is to be dropped or answered without the lock.
    fn settle(&self, state: &mut State, draw: &Draw) -> Vec<Job> {
        let mut closed: Vec<Job> = draw.cancelled.iter().filter_map(|id| state.jobs.remove(id)).collect();
        self.metrics.skipped.with_label_values(&["cancelled"]).inc_by(closed.len() as u64);
        self.metrics.skipped.with_label_values(&["expired"]).inc_by(draw.expired.len() as u64);
        for pick in &draw.expired {
            closed.extend(state.record(*pick, Err(SampleError::Expired)));
        }
        closed
    }
}

impl State {
    /// Notes what became of one sample; gives the job back when it was its last.
    fn record(&mut self, pick: Pick, outcome: Result<Vec<Output>, SampleError>) -> Option<Job> {
        let job = self.jobs.get_mut(&pick.job)?;
        job.outcomes[pick.sample] = Some(outcome);
        job.open -= 1;
        if job.open == 0 { self.jobs.remove(&pick.job) } else { None }
    }
}

impl Job {
    fn answer(self, now: Instant) {
        if self.reply.is_closed() {
            return;
        }
        let total = now.saturating_duration_since(self.arrived);
        let reply = Reply {
            outcomes: self.outcomes.into_iter().map(|outcome| outcome.unwrap_or(Err(SampleError::Expired))).collect(),
            queue: total.saturating_sub(self.forward),
            forward: self.forward,
        };
        let (queue, forward) = (reply.queue, reply.forward);
        self.submission.span.in_scope(|| tracing::debug!(?queue, ?forward, samples = reply.outcomes.len(), "scored"));
        // The room is free before the caller knows of the answer; nobody may be waiting for it any more.
        drop(self.submission);
        let _ = self.reply.send(Ok(reply));
    }
}

/// Hands work to a device worker. The worker ends when the last clone is dropped and the queue is empty.
#[derive(Clone)]
pub struct ScorerHandle {
    line: Arc<Line>,
}

struct Line(Arc<Shared>);

impl Drop for Line {
    fn drop(&mut self) {
        lock(&self.0.state).hung_up = true;
        self.0.wake.notify_all();
    }
}

impl ScorerHandle {
    pub fn options(&self) -> &ScorerOptions {
        &self.line.0.options
    }

    /// Whether the worker is there to answer.
    pub fn is_alive(&self) -> bool {
        !lock(&self.line.0.state).gone
    }

    /// Samples that wait for the device.
    pub fn queued_samples(&self) -> usize {
        lock(&self.line.0.state).queue.samples()
    }

    /// Queues a submission. Dropping the future withdraws what has not been run.
    pub fn submit(&self, submission: Submission) -> Result<impl Future<Output = Answer> + Send + use<>, ScorerError> {
        let shared = &self.line.0;
        let (reply, answer) = oneshot::channel();
        let arrived = shared.clock.now();
        let new = NewJob {
            lane: submission.lane,
            priority: submission.priority,
            arrived,
            deadline: submission.deadline,
            tokens: submission.encodings.iter().map(|encoding| encoding.tokens()).collect(),
        };
        let samples = new.tokens.len();
        let job = Job { submission, arrived, outcomes: vec![None; samples], open: samples, forward: Duration::ZERO, reply };
        self.enqueue(new, job)?;
        Ok(async move { answer.await.unwrap_or(Err(ScorerError::WorkerGone)) })
    }

    fn enqueue(&self, new: NewJob, job: Job) -> Result<(), ScorerError> {
        let shared = &self.line.0;
        if new.tokens.is_empty() {
            let now = job.arrived;
            job.answer(now);
            return Ok(());
        }
        let mut guard = lock(&shared.state);
        let state = &mut *guard;
        if state.gone {
            return Err(ScorerError::WorkerGone);
        }
        let mut closed = Vec::new();
        let pushed = match state.queue.push(new.clone()) {
            Err(_) => {
                // Work that nobody waits for makes room first.
                let jobs = &state.jobs;
                let draw = state.queue.sweep(job.arrived, |id| is_cancelled(jobs, id));
                closed = shared.settle(state, &draw);
                state.queue.push(new)
            }
            pushed => pushed,
        };
        let now = job.arrived;
        let result = match pushed {
            Ok(id) => {
                state.jobs.insert(id, job);
                Ok(())
            }
            Err(full) => {
                shared.metrics.shed.with_label_values(&[ShedReason::Queue.name()]).inc();
                Err(ScorerError::Full { message: full.to_string(), retry_after: shared.options.retry_after })
            }
        };
        shared.show_depth(state);
        drop(guard);
        shared.wake.notify_one();
        answer_all(closed, now);
        result
    }
}

/// A job of which nothing is known any more has no one to answer either.
fn is_cancelled(jobs: &HashMap<JobId, Job>, id: JobId) -> bool {
    jobs.get(&id).is_none_or(|job| job.reply.is_closed())
}

fn answer_all(jobs: Vec<Job>, now: Instant) {
    for job in jobs {
        job.answer(now);
    }
}

/// The one that owns the device. [`spawn`] gives it a thread; a test steps it by hand.
pub struct Worker {
    shared: Arc<Shared>,
    pool: Option<rayon::ThreadPool>,
}

/// A handle and its worker, which does nothing by itself and runs forwards on the thread that steps it.
pub fn pair(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> (ScorerHandle, Worker) {
    metrics.max_pack_tokens.set(i64::try_from(options.max_pack_tokens).unwrap_or(i64::MAX));
    let bounds = QueueBounds { max_samples: options.max_queue_samples, max_tokens: options.max_queue_tokens };
    let state = State { queue: Queue::new(bounds, options.ageing), jobs: HashMap::new(), gone: false, hung_up: false };
    let shared = Arc::new(Shared { options, clock, metrics, state: Mutex::new(state), wake: Condvar::new() });
    (ScorerHandle { line: Arc::new(Line(shared.clone())) }, Worker { shared, pool: None })
}

/// Starts the worker on a thread of its own, with a pool of its own for the forwards. The thread ends when the last
/// handle is dropped and the queue is empty.
pub fn spawn(options: ScorerOptions, clock: Clock, metrics: ScorerMetrics) -> std::io::Result<(ScorerHandle, std::thread::JoinHandle<()>)> {
    let (handle, mut worker) = pair(options, clock, metrics);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).thread_name(|i| format!("warm-device-{i}")).build();
    worker.pool = Some(pool.map_err(std::io::Error::other)?);
    let thread = std::thread::Builder::new().name("warm-device".to_owned()).spawn(move || worker.run())?;
    Ok((handle, thread))
}

/// What one step found to run.
struct Next {
    picks: Vec<Pick>,
    models: Arc<[Arc<dyn RewardModel>]>,
    encodings: Vec<Arc<Encoding>>,
    span: tracing::Span,
}

impl Worker {
    /// Settles what is expired or cancelled and runs one pack; false if there was nothing to do. Never waits.
    pub fn step(&mut self) -> bool {
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

    fn draw(&self, mut guard: std::sync::MutexGuard<'_, State>) -> (bool, Option<Next>) {
        let (shared, now) = (&self.shared, self.shared.clock.now());
        let limits = PackLimits { max_tokens: shared.options.max_pack_tokens, max_samples: shared.options.max_pack_samples };
        let state = &mut *guard;
        let jobs = &state.jobs;
        let draw = state.queue.next_pack(now, limits, |id| is_cancelled(jobs, id));
        let closed = shared.settle(state, &draw);
        shared.show_depth(state);
        let next = next_of(&draw, state, &shared.metrics, now);
        drop(guard);
        answer_all(closed, now);
        (!draw.is_empty(), next)
    }

    fn execute(&self, next: Next) {
        let (metrics, started) = (&self.shared.metrics, self.shared.clock.now());
        let result = next.span.in_scope(|| self.forward(&next));
        let ended = self.shared.clock.now();
        let took = ended.saturating_duration_since(started);
        metrics.forward_seconds.observe(took.as_secs_f64());
        let mut guard = lock(&self.shared.state);
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
                self.shared.show_depth(state);
                drop(guard);
                for job in closed {
                    drop(job.submission);
                    let _ = job.reply.send(Err(ScorerError::Forward(problem.clone())));
                }
            }
        }
    }

    /// All models over one pack: per sample, one output per model.
    fn forward(&self, next: &Next) -> Result<Vec<Vec<Output>>, String> {
        let run = || -> Result<(Vec<Vec<Output>>, usize), String> {
            // The models of a lane are of one architecture, so what may be shared is the same for all of them.
            let pack = Pack::forest(&next.encodings, |tokens| next.models.first()?.prefix_key(tokens));
            let mut samples = vec![Vec::with_capacity(next.models.len()); next.encodings.len()];
            for (i, model) in next.models.iter().enumerate() {
                let _forward = tracing::debug_span!("forward", model = i).entered();
                let outputs = model.forward(&pack).map_err(|error| error.to_string())?;
                if outputs.len() != samples.len() {
                    return Err(format!("expected {} outputs of the model, found {}", samples.len(), outputs.len()));
                }
                for (sample, output) in samples.iter_mut().zip(outputs) {
                    sample.push(output);
                }
            }
            Ok((samples, pack.computed_tokens()))
        };
        let caught = catch_unwind(AssertUnwindSafe(|| match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }));
        let (metrics, tokens) = (&self.shared.metrics, next.picks.iter().map(|pick| pick.tokens).sum::<usize>());
        metrics.pack_samples.observe(next.picks.len() as f64);
        let outcome = match &caught {
            Ok(Ok((samples, computed))) => {
                metrics.pack_tokens.observe(*computed as f64);
                metrics.samples.inc_by(samples.len() as u64);
                metrics.tokens_shared.inc_by((tokens.saturating_sub(*computed) * next.models.len()) as u64);
                metrics.tokens_computed.inc_by((computed * next.models.len()) as u64);
                "ok"
            }
            Ok(Err(_)) => "error",
            Err(_) => "panic",
        };
        metrics.packs.with_label_values(&[outcome]).inc();
        let result = caught.unwrap_or_else(|panic| Err(format!("the forward pass panicked: {}", panic_message(panic.as_ref()))));
        let result = result.map(|(samples, _)| samples);
        if let Err(problem) = &result {
            tracing::error!(problem, samples = next.picks.len(), tokens, "a pack failed");
        }
        result
    }
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

fn next_of(draw: &Draw, state: &State, metrics: &ScorerMetrics, now: Instant) -> Option<Next> {
    let first = state.jobs.get(&draw.picks.first()?.job)?;
    let span = tracing::debug_span!("pack", lane = first.submission.lane, samples = draw.picks.len(), tokens = draw.tokens());
    let mut encodings = Vec::with_capacity(draw.picks.len());
    let mut last = None;
    for pick in &draw.picks {
        let job = state.jobs.get(&pick.job)?;
        encodings.push(job.submission.encodings[pick.sample].clone());
        if last.replace(pick.job) != Some(pick.job) {
            span.follows_from(&job.submission.span);
            metrics.queue_seconds.observe(now.saturating_duration_since(job.arrived).as_secs_f64());
        }
    }
    Some(Next { picks: draw.picks.clone(), models: first.submission.models.clone(), encodings, span })
}

/// The words of a panic, where it has some.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
