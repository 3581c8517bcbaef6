//! The line in front of a device: what waits, who waits for it, and the handle that puts work into it.

use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::forward::Next;
use super::load::loads;
use super::{JobId, NewJob, Pick, Queue, Reply, SampleError, ScorerError, ScorerMetrics, ScorerOptions, ShedReason, Submission};
use crate::clock::Clock;
use crate::lock::lock;
use crate::model::Output;

pub(super) type Answer = Result<Reply, ScorerError>;

/// A submission that somebody waits for.
pub(super) struct Job {
    pub submission: Submission,
    pub arrived: Instant,
    /// Until a pack has the first of its samples.
    pub queued: Option<tracing::Span>,
    pub outcomes: Vec<Option<Result<Vec<Output>, SampleError>>>,
    /// Samples whose outcome is still to come.
    open: usize,
    /// Those of them that a device works at.
    running: usize,
    /// Nobody waits for it any more; it stays until no device works at it.
    pub abandoned: bool,
    forward: Duration,
    reply: oneshot::Sender<Answer>,
}

pub(super) struct State {
    pub queue: Queue,
    pub jobs: HashMap<JobId, Job>,
    /// Full packs that were made ready while the devices were busy, for whichever of them is the first to have time.
    pub ahead: VecDeque<Next>,
    /// Workers that run.
    pub workers: usize,
    /// A worker has ended before its time, so not all would be answered.
    pub gone: bool,
    /// The last handle has been dropped, so nothing more will come.
    pub hung_up: bool,
}

pub(super) struct Shared {
    pub options: ScorerOptions,
    pub clock: Clock,
    pub metrics: ScorerMetrics,
    pub state: Mutex<State>,
    pub wake: Condvar,
    /// Of the beginnings of samples.
    pub hashes: RandomState,
    /// Turns true with [`State::gone`].
    pub gone: watch::Sender<bool>,
    /// Tokens of one pack, at most, as far as the devices have room.
    pub max_pack_tokens: AtomicUsize,
}

impl Shared {
    pub fn show_depth(&self, state: &State) {
        self.metrics.queue_samples.set(state.queue.samples() as i64);
        self.metrics.queue_tokens.set(state.queue.tokens() as i64);
    }

    /// Settles samples that came too late. What comes back is to be answered without the lock.
    pub fn settle(&self, state: &mut State, expired: &[Pick]) -> Vec<Job> {
        self.metrics.skipped.with_label_values(&["expired"]).inc_by(expired.len() as u64);
        expired.iter().filter_map(|pick| state.record(*pick, Err(SampleError::Expired))).collect()
    }
}

impl State {
    /// Notes that a device works at these samples.
    pub fn start(&mut self, picks: &[Pick]) {
        for pick in picks {
            if let Some(job) = self.jobs.get_mut(&pick.job) {
                job.running += 1;
                job.open += usize::from(job.abandoned);
            }
        }
    }

    /// Notes that a device has let go of these samples, after it took so long.
    pub fn stop(&mut self, picks: &[Pick], took: Duration) {
        for (index, pick) in picks.iter().enumerate() {
            if let Some(job) = self.jobs.get_mut(&pick.job) {
                job.running -= 1;
                // Those of a job stand side by side.
                if index == 0 || picks[index - 1].job != pick.job {
                    job.forward += took;
                }
            }
        }
    }

    /// Takes back what no device works at. Says whether there was any, and gives the job back unless a device works at it.
    fn abandon(&mut self, id: JobId) -> (bool, Option<Job>) {
        self.queue.remove(id);
        let Some(job) = self.jobs.get_mut(&id) else { return (false, None) };
        let skipped = job.open > job.running;
        (job.open, job.abandoned) = (job.running, true);
        (skipped, if job.running == 0 { self.jobs.remove(&id) } else { None })
    }

    /// Notes what became of one sample; gives the job back when it was its last. Nothing happens to a job that is gone.
    pub fn record(&mut self, pick: Pick, outcome: Result<Vec<Output>, SampleError>) -> Option<Job> {
        let job = self.jobs.get_mut(&pick.job)?;
        job.outcomes[pick.sample] = Some(outcome);
        job.open -= 1;
        if job.open == 0 { self.jobs.remove(&pick.job) } else { None }
    }

    /// Takes out the job of a sample that cannot be answered, with what is left of it in the queue; `None` if it is gone.
    pub fn withdraw(&mut self, pick: Pick) -> Option<Job> {
        self.queue.remove(pick.job);
        self.jobs.remove(&pick.job)
    }
}

impl Job {
    pub fn answer(self, now: Instant) {
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

    pub fn fail(self, error: ScorerError) {
        drop(self.submission);
        let _ = self.reply.send(Err(error));
    }
}

pub(super) fn answer_all(jobs: Vec<Job>, now: Instant) {
    for job in jobs {
        job.answer(now);
    }
}

/// Hands work to a device worker. The worker ends when the last clone is dropped and the queue is empty.
#[derive(Clone)]
pub struct ScorerHandle {
    line: Arc<Line>,
}

pub(super) struct Line(Arc<Shared>);

impl Drop for Line {
    fn drop(&mut self) {
        lock(&self.0.state).hung_up = true;
        self.0.wake.notify_all();
    }
}

/// Somebody waits for this job. Dropped before its answer, what no device works at is withdrawn at once, and its permit is
/// given back when none does.
struct Ticket {
    shared: Arc<Shared>,
    job: JobId,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        let (skipped, withdrawn) = state.abandon(self.job);
        if skipped {
            self.shared.metrics.skipped.with_label_values(&["cancelled"]).inc();
            self.shared.show_depth(&state);
        }
        drop(state);
        // Its permit is given back without the lock.
        drop(withdrawn);
    }
}

impl ScorerHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { line: Arc::new(Line(shared)) }
    }

    pub fn options(&self) -> &ScorerOptions {
        &self.line.0.options
    }

    /// Whether every worker is there to answer.
    pub fn is_alive(&self) -> bool {
        !lock(&self.line.0.state).gone
    }

    /// Ends when a worker has ended before its time: a device is lost, or something panicked where nothing may. From then on
    /// nothing is scored any more.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut gone = self.line.0.gone.subscribe();
        async move {
            // The sender lives as long as this handle's line; without it there is nobody to wait for either.
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }

    /// Tokens of one pack, at most.
    pub fn max_pack_tokens(&self) -> usize {
        self.line.0.max_pack_tokens.load(Ordering::Relaxed)
    }

    /// Sets what one pack may hold from now on. A sample that is longer is run by itself.
    pub fn set_max_pack_tokens(&self, tokens: usize) {
        let shared = &self.line.0;
        shared.max_pack_tokens.store(tokens.max(1), Ordering::Relaxed);
        shared.metrics.max_pack_tokens.set(i64::try_from(tokens).unwrap_or(i64::MAX));
    }

    /// Samples that wait for the device.
    pub fn queued_samples(&self) -> usize {
        lock(&self.line.0.state).queue.samples()
    }

    /// Whether nothing waits for the device and nothing runs on it.
    pub fn is_idle(&self) -> bool {
        let state = lock(&self.line.0.state);
        state.queue.samples() == 0 && state.jobs.is_empty()
    }

    /// Queues a submission. Dropping the future withdraws what has not been run.
    pub fn submit(&self, submission: Submission) -> Result<impl Future<Output = Answer> + Send + use<>, ScorerError> {
        let shared = &self.line.0;
        let (reply, answer) = oneshot::channel();
        let arrived = shared.clock.now();
        let new = NewJob {
            lane: submission.lane,
            tenant: submission.tenant.clone(),
            priority: submission.priority,
            arrived,
            deadline: submission.deadline,
            samples: submission
                .models
                .first()
                .map_or_else(Vec::new, |model| loads(&**model, submission.lane, &submission.encodings, &shared.hashes)),
        };
        let samples = new.samples.len();
        let queued = Some(tracing::debug_span!(parent: &submission.span, "queue", samples));
        let job = Job {
            submission,
            arrived,
            queued,
            outcomes: vec![None; samples],
            open: samples,
            running: 0,
            abandoned: false,
            forward: Duration::ZERO,
            reply,
        };
        let ticket = self.enqueue(new, job)?;
        Ok(async move {
            let answer = answer.await.unwrap_or(Err(ScorerError::WorkerGone));
            drop(ticket);
            answer
        })
    }

    fn enqueue(&self, new: NewJob, job: Job) -> Result<Option<Ticket>, ScorerError> {
        let shared = &self.line.0;
        let now = job.arrived;
        if new.samples.is_empty() {
            job.answer(now);
            return Ok(None);
        }
        let mut guard = lock(&shared.state);
        let state = &mut *guard;
        if state.gone {
            return Err(ScorerError::WorkerGone);
        }
        let mut closed = Vec::new();
        if state.queue.room_for(&new).is_err() {
            // What came too late makes room first.
            let expired = state.queue.expire(now);
            closed = shared.settle(state, &expired);
        }
        let result = match state.queue.push(new) {
            Ok(id) => {
                state.jobs.insert(id, job);
                Ok(Some(Ticket { shared: shared.clone(), job: id }))
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
