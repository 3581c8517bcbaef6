//! Scoring by the live generation: pin, encode, submit, wait no longer than the deadline, fold.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Instrument;

use super::canary::Answers;
use super::generation::Generation;
use super::lanes::Lane;
use super::outcomes::{answer, first, first_failure, member, non_finite, outcome, resident, scored};
use super::pool::{Encoded, Pool, Reading, caught};
use super::streamed::Place;
use super::watch::Judged;
use super::{CallOptions, CompareOptions, CompareReply, EngineError, ModelStamp, Registry, ScoreReply, Timing, Watch};
use crate::clock::Clock;
use crate::domain::{Failure, Fingerprint, MemberName, Sample, Scored, Truncation};
use crate::model::{Output, RewardModel};
use crate::scorer::{Permit, Reply, SampleError, ScorerHandle, Submission};
use crate::text::{Before, Encoding};

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// The name of this process in every stamp.
    pub instance: String,
    /// Threads of the pool that encodes; 0 is one per core.
    pub tokenizer_threads: usize,
    /// Requests of less than this many bytes are encoded where they are: a hop to the pool would cost more.
    pub inline_bytes: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { instance: String::new(), tokenizer_threads: 0, inline_bytes: 4096 }
    }
}

/// Samples of a canary that are submitted together: no request waits for more than these.
const ANSWERS_AT_ONCE: usize = 2;
/// How often a full queue is tried again for one chunk of a canary.
const ANSWER_TRIES: usize = 120;

/// What the engine stands on.
#[derive(Clone)]
pub struct EngineParts {
    pub registry: Registry,
    pub scorer: ScorerHandle,
    pub clock: Clock,
    /// Absent where nobody looks.
    pub watch: Option<Watch>,
}

/// Scores and compares by the live generation. Clones are handles of the same.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    parts: EngineParts,
    options: EngineOptions,
    pool: Pool,
    place: Place,
}

/// A sample that went through the models: what was read, and one output per model of the lane.
pub(super) type Row = Result<(Arc<Encoding>, Vec<Output>), Failure>;

/// A call that went through the scorer.
pub(super) struct Run {
    pub rows: Vec<Row>,
    pub stamp: ModelStamp,
    pub timing: Timing,
}

impl Engine {
    /// Starts the pool that encodes.
    pub fn new(parts: EngineParts, options: EngineOptions) -> std::io::Result<Self> {
        let pool = Pool::new(options.tokenizer_threads)?;
        Ok(Self(Arc::new(Inner { parts, options, pool, place: Place::default() })))
    }

    pub fn registry(&self) -> &Registry {
        &self.0.parts.registry
    }

    pub fn scorer(&self) -> &ScorerHandle {
        &self.0.parts.scorer
    }

    pub fn clock(&self) -> &Clock {
        &self.0.parts.clock
    }

    /// What is watched, if anything is.
    pub fn watch(&self) -> Option<&Watch> {
        self.0.parts.watch.as_ref()
    }

    /// The name of this process.
    pub fn instance(&self) -> &str {
        &self.0.options.instance
    }

    /// The stamp of a generation, as replies carry it.
    pub fn stamp(&self, generation: &Generation) -> ModelStamp {
        ModelStamp {
            fingerprint: generation.fingerprint,
            generation: generation.id,
            instance: self.0.options.instance.clone(),
            weights_id: generation.weights_id,
        }
    }

    /// Scores all samples by one generation. Needs a tokio runtime with a timer if `options.deadline` is set; dropping
    /// the future withdraws the work. The permit is held until the device has let go of the samples.
    pub async fn score(&self, samples: Vec<Sample>, options: CallOptions, permit: Permit) -> Result<ScoreReply, EngineError> {
        self.in_time(options.deadline, self.score_now(samples, &options, permit)).await
    }

    async fn score_now(&self, samples: Vec<Sample>, options: &CallOptions, permit: Permit) -> Result<ScoreReply, EngineError> {
        let generation = self.pin(options)?;
        let lane = self.scorer_lane(&generation, options).await?;
        let run = self.run(&generation, lane, samples, options, permit).await?;
        let scorer = options.scorer.as_deref().filter(|name| !name.is_empty());
        let own = match scorer {
            None => generation.calibration.as_ref(),
            Some(name) => generation.member_calibrations.iter().find(|(member, _)| member.as_str() == name).map(|(_, own)| own),
        };
        let calibration = own.filter(|_| options.calibrated);
        // What a member says, or a generation that is not live any more, tells nothing of the run.
        let is_live = || self.registry().current().is_some_and(|live| live.id == generation.id);
        let watched = options.watched.as_ref().zip(self.0.parts.watch.as_ref()).filter(|_| scorer.is_none() && is_live());
        let mut judged = Vec::new();
        let score = |row: Row| {
            let found = row.and_then(|(encoding, outputs)| Ok((scored(&encoding, first(&outputs)?, options.details)?, encoding)));
            if watched.is_some() {
                let judge = |(scored, encoding): &(Scored, Arc<Encoding>)| Judged { encoding: encoding.clone(), reward: scored.reward };
                judged.push(found.as_ref().map(judge).map_err(|failure| failure.kind));
            }
            let (mut scored, _) = found?;
            self.registry().metrics().rewarded(scored.reward);
            if let Some(calibration) = calibration {
                scored.reward = calibration.apply(scored.reward).map_err(non_finite)?;
            }
            Ok(scored)
        };
        let outcomes = run.rows.into_iter().map(score).collect();
        if let Some((whose, watch)) = watched {
            watch.observe(whose, &generation, &judged);
        }
        let outcomes = self.close(outcomes, options)?;
        Ok(ScoreReply { outcomes, stamp: run.stamp, timing: run.timing })
    }

    /// Scores all samples with the merged model and the members of one generation, over the same packs.
    pub async fn compare(
        &self,
        samples: Vec<Sample>,
        options: CallOptions,
        compare: CompareOptions,
        permit: Permit,
    ) -> Result<CompareReply, EngineError> {
        self.in_time(options.deadline, super::compare::run(self, samples, &options, compare, permit)).await
    }

    /// The raw rewards of some samples by the live generation, as a canary wants them: what it cannot read has none, and
    /// what is not finite is NaN. A queue that is full is waited for.
    pub(super) async fn answers(&self, generation: &Generation, samples: &[Sample]) -> Result<Answers, EngineError> {
        let options = CallOptions { truncation: Truncation::Left, ..CallOptions::default() };
        let mut answers = Vec::with_capacity(samples.len());
        for chunk in samples.chunks(ANSWERS_AT_ONCE) {
            let mut tries = 0;
            let run = loop {
                let lane = generation.merged.clone();
                match self.run(generation, lane, chunk.to_vec(), &options, Permit::unlimited()).await {
                    Err(EngineError::Overloaded { retry_after, .. }) if tries < ANSWER_TRIES => {
                        tries += 1;
                        self.clock().sleep_until(self.clock().now() + retry_after).await;
                    }
                    other => break other?,
                }
            };
            answers.extend(
                run.rows.into_iter().map(|row| answer(row.and_then(|(encoding, outputs)| scored(&encoding, first(&outputs)?, false)))),
            );
        }
        Ok(answers)
    }

    /// The generation that answers a call: the one that was asked for, which must be live or held, or else the live one.
    pub(super) fn pin(&self, options: &CallOptions) -> Result<Arc<Generation>, EngineError> {
        let live =
            || self.registry().current().ok_or_else(|| EngineError::NotReady("none is live, because one is being loaded".to_owned()));
        let Some(asked) = options.fingerprint.as_deref().filter(|asked| !asked.is_empty()) else { return live() };
        let served = Fingerprint::from_hex(asked).and_then(|fingerprint| self.registry().serving(fingerprint));
        match served {
            Some(generation) => Ok(generation),
            None => Err(EngineError::FingerprintNotServed { asked: asked.chars().take(128).collect(), live: live()?.fingerprint }),
        }
    }

    /// Encodes, submits and waits.
    pub(super) async fn run(
        &self,
        generation: &Generation,
        lane: Lane,
        samples: Vec<Sample>,
        options: &CallOptions,
        permit: Permit,
    ) -> Result<Run, EngineError> {
        if samples.is_empty() {
            return Err(EngineError::invalid("samples", "expected at least one sample, found none"));
        }
        let clock = self.clock();
        let started = clock.now();
        let bytes: usize = samples.iter().map(Sample::size_bytes).sum();
        permit.in_time(options.deadline.map(|deadline| deadline.saturating_duration_since(started)))?;
        // No sample is scored that has more tokens than the model takes.
        let most = generation.limits().max_tokens;
        permit.charge(samples.iter().map(|sample| sample.estimated_tokens().min(most).max(1) as u64).sum())?;
        let tokenizing = tracing::debug_span!("tokenize", samples = samples.len(), bytes);
        let reading = Reading { text: generation.text.clone(), truncation: options.truncation, rendered: options.details };
        let encoded = self.encode(reading, samples, bytes, &permit).instrument(tokenizing).await?;
        let tokenize = clock.now().saturating_duration_since(started);
        self.registry().metrics().tokenized(tokenize);
        self.registry().metrics().dropped_bos(encoded.iter().flatten().filter(|encoding| encoding.doubled_bos()).count() as u64);
        permit.correct(encoded.iter().flatten().map(|encoding| encoding.tokens() as u64).sum())?;
        // Nothing of a call that fails is scored.
        let encoded = if options.strict { self.close(encoded, options)? } else { encoded };
        let encodings: Vec<_> = encoded.iter().flatten().cloned().collect();
        let reply = if encodings.is_empty() {
            Reply { outcomes: Vec::new(), queue: Duration::ZERO, forward: Duration::ZERO }
        } else {
            self.submit(lane, encodings, options, permit).await?
        };
        let mut outcomes = reply.outcomes.into_iter();
        let rows = encoded.into_iter().map(|encoding| {
            let encoding = encoding?;
            Ok((encoding, outcome(outcomes.next())?))
        });
        let rows = rows.collect();
        let total = clock.now().saturating_duration_since(started);
        let timing = Timing { queue: reply.queue, tokenize, forward: reply.forward, total };
        Ok(Run { rows, stamp: self.stamp(generation), timing })
    }

    /// The same samples by further models: their outputs stand behind those that the rows have already.
    pub(super) async fn run_again(&self, run: &mut Run, lane: Lane, options: &CallOptions, permit: Permit) -> Result<(), EngineError> {
        let started = self.clock().now();
        let encodings: Vec<_> = run.rows.iter().flatten().map(|(encoding, _)| encoding.clone()).collect();
        if encodings.is_empty() {
            return Ok(());
        }
        let reply = self.submit(lane, encodings, options, permit).await?;
        let mut outcomes = reply.outcomes.into_iter();
        for row in &mut run.rows {
            let Ok((_, outputs)) = row else { continue };
            match outcome(outcomes.next()) {
                Ok(more) => outputs.extend(more),
                Err(failure) => *row = Err(failure),
            }
        }
        run.timing.queue += reply.queue;
        run.timing.forward += reply.forward;
        run.timing.total += self.clock().now().saturating_duration_since(started);
        Ok(())
    }

    /// Queues encodings for the models of a lane and waits. Where all of them expired, or one of a strict call, the call has.
    pub(super) async fn submit(
        &self,
        lane: Lane,
        encodings: Vec<Arc<Encoding>>,
        options: &CallOptions,
        permit: Permit,
    ) -> Result<Reply, EngineError> {
        // From the queue to the reply; the packs that it rides in refer to it.
        let span = tracing::debug_span!(
            "device",
            samples = encodings.len(),
            tokens = encodings.iter().map(|encoding| encoding.tokens()).sum::<usize>(),
            queue_us = tracing::field::Empty,
            forward_us = tracing::field::Empty
        );
        let submission = Submission {
            models: lane.models,
            lane: lane.number,
            encodings,
            deadline: options.deadline,
            tenant: options.tenant.clone().unwrap_or_default(),
            priority: options.priority,
            permit,
            span: span.clone(),
        };
        let reply = self.scorer().submit(submission)?.await?;
        span.record("queue_us", reply.queue.as_micros() as u64);
        span.record("forward_us", reply.forward.as_micros() as u64);
        let expired = |outcome: &Result<_, SampleError>| matches!(outcome, Err(SampleError::Expired));
        if reply.outcomes.iter().any(expired) && (options.strict || reply.outcomes.iter().all(expired)) {
            return Err(EngineError::DeadlineExceeded);
        }
        Ok(reply)
    }

    /// Loads a member that does not stand on the device.
    pub(super) async fn streamed(&self, generation: &Generation, name: &MemberName) -> Result<Arc<dyn RewardModel>, EngineError> {
        let index = generation.info.members.iter().position(|member| member.name == *name);
        let (Some(members), Some(index)) = (generation.streamed.clone(), index) else { return Err(EngineError::MembersNotLoaded) };
        self.0.place.load(members, index, name).await
    }

    /// The models of a call.
    async fn scorer_lane(&self, generation: &Generation, options: &CallOptions) -> Result<Lane, EngineError> {
        let Some(name) = options.scorer.as_deref().filter(|name| !name.is_empty()) else {
            if options.calibrated && generation.calibration.is_none() {
                return Err(EngineError::CalibrationMissing);
            }
            return Ok(generation.merged.clone());
        };
        let name = member(generation, name)?;
        if options.calibrated && !generation.member_calibrations.contains_key(&name) {
            return Err(EngineError::CalibrationMissing);
        }
        if let Some(lane) = resident(generation, &name) {
            return Ok(lane.clone());
        }
        Ok(Lane::new([self.streamed(generation, &name).await?]))
    }

    /// What `work` comes to in the pool that encodes: for what would hold up a thread of the runtime.
    pub async fn in_pool<T: Send + 'static>(&self, permit: Permit, work: impl FnOnce() -> T + Send + 'static) -> Result<T, EngineError> {
        self.0.pool.run(permit, work).await
    }

    /// Small requests are encoded here, others in the pool, so that no thread of the runtime is held up.
    async fn encode(&self, reading: Reading, samples: Vec<Sample>, bytes: usize, permit: &Permit) -> Result<Encoded, EngineError> {
        if bytes < self.0.options.inline_bytes {
            let mut before = Before::default();
            return caught(|| samples.iter().map(|sample| reading.encode(sample, &mut before)).collect());
        }
        self.0.pool.encode(reading, samples, permit.clone()).await
    }

    /// Counts failures, and lets the first one fail a strict call.
    pub(super) fn close<T>(
        &self,
        outcomes: Vec<Result<T, Failure>>,
        options: &CallOptions,
    ) -> Result<Vec<Result<T, Failure>>, EngineError> {
        for failure in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            self.registry().metrics().failed(failure);
        }
        if options.strict {
            first_failure(&outcomes)?;
        }
        Ok(outcomes)
    }

    /// The deadline also holds while a call is encoded or queued: whoever waits is told at once, and the work is withdrawn.
    async fn in_time<T>(&self, deadline: Option<Instant>, call: impl Future<Output = Result<T, EngineError>>) -> Result<T, EngineError> {
        let Some(deadline) = deadline else { return call.await };
        if self.clock().now() >= deadline {
            return Err(EngineError::DeadlineExceeded);
        }
        tokio::select! {
            biased;
            result = call => result,
            () = self.clock().sleep_until(deadline) => Err(EngineError::DeadlineExceeded),
        }
    }
}
