//! Scoring by the live generation: pin, encode, submit, wait no longer than the deadline, fold.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use tokio::sync::oneshot;
use tracing::Instrument;

use super::generation::{Encode, Generation, Lane};
use super::{CallOptions, CompareOptions, CompareReply, EngineError, ModelStamp, Registry, ScoreReply, Timing};
use crate::clock::Clock;
use crate::domain::{Failure, FailureKind, Sample, Score, ScoreDetails, Scored, Step, Truncation};
use crate::model::{Output, StepOutput};
use crate::scorer::{Permit, Reply, SampleError, ScorerHandle, Submission, panic_message};
use crate::text::Encoding;

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

/// What the engine stands on.
#[derive(Clone)]
pub struct EngineParts {
    pub registry: Registry,
    pub scorer: ScorerHandle,
    pub clock: Clock,
}

/// Scores and compares by the live generation. Clones are handles of the same.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    parts: EngineParts,
    options: EngineOptions,
    pool: rayon::ThreadPool,
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
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.tokenizer_threads)
            .thread_name(|i| format!("warm-tokenizer-{i}"))
            .build()
            .map_err(std::io::Error::other)?;
        Ok(Self(Arc::new(Inner { parts, options, pool })))
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
        let lane = scorer_lane(&generation, options)?;
        let run = self.run(&generation, lane, samples, options, permit).await?;
        let calibration = if options.calibrated { generation.calibration.as_ref() } else { None };
        let score = |row: Row| {
            let (encoding, outputs) = row?;
            let output = first(&outputs)?;
            let mut scored = scored(&encoding, output, options.details)?;
            self.registry().metrics().rewarded(scored.reward);
            if let Some(calibration) = calibration {
                scored.reward = calibration.apply(scored.reward).map_err(non_finite)?;
            }
            Ok(scored)
        };
        let outcomes = self.close(run.rows.into_iter().map(score).collect(), options)?;
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

    /// The generation that answers a call: the live one, which must be the one that was asked for.
    pub(super) fn pin(&self, options: &CallOptions) -> Result<Arc<Generation>, EngineError> {
        let generation = self.registry().current().ok_or_else(|| EngineError::NotReady("none has been loaded yet".to_owned()))?;
        match options.fingerprint.as_deref() {
            Some(asked) if !asked.is_empty() && !asked.eq_ignore_ascii_case(&generation.fingerprint.to_string()) => {
                Err(EngineError::FingerprintNotServed { asked: asked.chars().take(128).collect(), live: generation.fingerprint })
            }
            _ => Ok(generation),
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
        // Half the bytes: more than any usual text has tokens, and the samples' own special tokens.
        permit.charge((bytes / 2).max(samples.len()) as u64)?;
        let tokenizing = tracing::debug_span!("tokenize", samples = samples.len(), bytes);
        let encoded = self.encode(&generation.text, samples, bytes, options.truncation).instrument(tokenizing).await?;
        let tokenize = clock.now().saturating_duration_since(started);
        self.registry().metrics().tokenized(tokenize);
        self.registry().metrics().dropped_bos(encoded.iter().flatten().filter(|encoding| encoding.doubled_bos()).count() as u64);
        permit.correct(encoded.iter().flatten().map(|encoding| encoding.tokens() as u64).sum());
        if options.strict {
            first_failure(&encoded)?;
        }
        let encodings: Vec<_> = encoded.iter().flatten().cloned().collect();
        let reply = if encodings.is_empty() {
            Reply { outcomes: Vec::new(), queue: Duration::ZERO, forward: Duration::ZERO }
        } else {
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
            reply
        };
        let expired = |outcome: &Result<_, SampleError>| matches!(outcome, Err(SampleError::Expired));
        if reply.outcomes.iter().any(expired) && (options.strict || reply.outcomes.iter().all(expired)) {
            return Err(EngineError::DeadlineExceeded);
        }
        let mut outcomes = reply.outcomes.into_iter();
        let rows = encoded.into_iter().map(|encoding| {
            let encoding = encoding?;
            match outcomes.next() {
                Some(Ok(outputs)) => Ok((encoding, outputs)),
                Some(Err(error @ SampleError::Expired)) => Err(Failure::new(FailureKind::Expired, error.to_string())),
                None => Err(Failure::new(FailureKind::Expired, "the device worker gave no answer for the sample")),
            }
        });
        let rows = rows.collect();
        let total = clock.now().saturating_duration_since(started);
        let timing = Timing { queue: reply.queue, tokenize, forward: reply.forward, total };
        Ok(Run { rows, stamp: self.stamp(generation), timing })
    }

    /// Small requests are encoded here, others in the pool, so that no thread of the runtime is held up.
    async fn encode(
        &self,
        text: &Arc<dyn Encode>,
        samples: Vec<Sample>,
        bytes: usize,
        truncation: Truncation,
    ) -> Result<Vec<Result<Arc<Encoding>, Failure>>, EngineError> {
        let panicked =
            |panic: Box<dyn std::any::Any + Send>| EngineError::Forward(format!("encoding panicked: {}", panic_message(panic.as_ref())));
        if bytes < self.0.options.inline_bytes {
            let encode = || samples.iter().map(|sample| text.encode(sample, truncation).map(Arc::new)).collect();
            return catch_unwind(AssertUnwindSafe(encode)).map_err(panicked);
        }
        let (done, encoded) = oneshot::channel();
        let text = text.clone();
        self.0.pool.spawn(move || {
            let encode = || -> Option<Vec<_>> {
                // A caller that has gone stops this between two samples.
                let one = |sample| (!done.is_closed()).then(|| text.encode(sample, truncation).map(Arc::new));
                samples.par_iter().map(one).collect()
            };
            let result = catch_unwind(AssertUnwindSafe(encode));
            let _ = done.send(result);
        });
        match encoded.await {
            Ok(Ok(Some(encoded))) => Ok(encoded),
            Ok(Err(panic)) => Err(panicked(panic)),
            Ok(Ok(None)) | Err(_) => Err(EngineError::Forward("encoding was given up".to_owned())),
        }
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

fn first_failure<T>(outcomes: &[Result<T, Failure>]) -> Result<(), EngineError> {
    let failed = outcomes.iter().enumerate().find_map(|(index, outcome)| Some((index, outcome.as_ref().err()?)));
    failed.map_or(Ok(()), |(index, failure)| Err(EngineError::Strict { index, failure: failure.clone() }))
}

fn scorer_lane(generation: &Generation, options: &CallOptions) -> Result<Lane, EngineError> {
    let Some(name) = options.scorer.as_deref().filter(|name| !name.is_empty()) else {
        if options.calibrated && generation.calibration.is_none() {
            return Err(EngineError::CalibrationMissing);
        }
        return Ok(generation.merged.clone());
    };
    let lane = member(generation, name)?;
    // The calibration is the merged model's; a member's rewards have another mean and scale.
    if options.calibrated { Err(EngineError::CalibrationMissing) } else { Ok(generation.resident[lane].1.clone()) }
}

/// The index of a member on the device.
pub(super) fn member(generation: &Generation, name: &str) -> Result<usize, EngineError> {
    if let Some(index) = generation.resident.iter().position(|(member, _)| member.as_str() == name) {
        return Ok(index);
    }
    let known: Vec<_> = generation.info.members.iter().map(|member| member.name.clone()).collect();
    if known.iter().any(|member| member.as_str() == name) {
        return Err(EngineError::MembersNotLoaded);
    }
    Err(EngineError::UnknownMember { name: name.chars().take(128).collect(), known })
}

pub(super) fn non_finite(error: crate::domain::NonFinite) -> Failure {
    Failure::new(FailureKind::NonFinite, error.to_string())
}

fn first(outputs: &[Output]) -> Result<&Output, Failure> {
    outputs.first().ok_or_else(|| Failure::new(FailureKind::NonFinite, "the model has no output"))
}

/// The reward; every number beside it must be finite too.
pub(super) fn reward(output: &Output) -> Result<Score, Failure> {
    let beside = output.values.iter().chain(output.steps.iter().flat_map(|step| step.outputs.iter()));
    if let Some(bad) = beside.copied().find_map(|value| Score::try_from(value).err()) {
        return Err(non_finite(bad));
    }
    Score::try_from(output.reward).map_err(non_finite)
}

pub(super) fn scored(encoding: &Encoding, output: &Output, details: bool) -> Result<Scored, Failure> {
    let reward = reward(output)?;
    let step = |step: &StepOutput| {
        let reward = Score::try_from(step.reward).map_err(non_finite)?;
        Ok(Step { position: step.position, reward, outputs: step.outputs.clone() })
    };
    Ok(Scored {
        reward,
        outputs: if output.values.len() > 1 { output.values.clone() } else { Vec::new() },
        steps: output.steps.iter().map(step).collect::<Result<_, Failure>>()?,
        tokens: encoding.tokens(),
        truncated: encoding.truncated(),
        details: details.then(|| ScoreDetails {
            token_ids: encoding.ids().to_vec(),
            pooled_position: output.pooled_position,
            shared_tokens: output.shared_tokens,
            rendered: encoding.rendered().unwrap_or_default().to_owned(),
        }),
    })
}
