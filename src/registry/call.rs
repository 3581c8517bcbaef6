//! What a call asks for, and what it is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Watched;
use crate::domain::{Failure, Fingerprint, GenerationId, MemberName, Scored, Truncation, WeightsId};
use crate::scorer::{ScorerError, Shed, ShedReason};

/// What a caller wants of one call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CallOptions {
    pub truncation: Truncation,
    /// Rewards in units of the loaded calibration.
    pub calibrated: bool,
    /// In hex; the call fails unless the generation of this name answers it.
    pub fingerprint: Option<String>,
    /// Fill `Scored::details`.
    pub details: bool,
    /// Higher first among the calls of the same tenant.
    pub priority: i32,
    /// Tenants take turns on the device; `None` is one of them.
    pub tenant: Option<Arc<str>>,
    /// One sample that cannot be scored fails the call.
    pub strict: bool,
    pub deadline: Option<Instant>,
    /// A member that scores instead of the merged model; `None` or empty for the merged model.
    pub scorer: Option<String>,
    /// Whose run the call belongs to; `None` for a call that no policy is trained by.
    pub watched: Option<Watched>,
}

/// Who scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelStamp {
    pub fingerprint: Fingerprint,
    pub generation: GenerationId,
    pub instance: String,
    pub weights_id: WeightsId,
}

/// Where the time of one call went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    pub queue: Duration,
    pub tokenize: Duration,
    pub forward: Duration,
    pub total: Duration,
}

/// One outcome per sample, in order, all of one generation.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreReply {
    pub outcomes: Vec<Result<Scored, Failure>>,
    pub stamp: ModelStamp,
    pub timing: Timing,
}

/// Why a call as a whole was not answered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineError {
    #[error("{message}")]
    Overloaded { message: String, retry_after: Duration },
    #[error("the deadline passed before all samples were scored")]
    DeadlineExceeded,
    #[error("no model is ready: {0}")]
    NotReady(String),
    #[error("the server is about to stop")]
    Draining { retry_after: Duration },
    #[error("no member is named {name:?}; expected one of: {}", join(.known))]
    UnknownMember { name: String, known: Vec<MemberName> },
    #[error("the generation with fingerprint {asked:?} is not served; the live one is {live}")]
    FingerprintNotServed { asked: String, live: Fingerprint },
    #[error("the members are not loaded: this server runs with `ensemble: off`")]
    MembersNotLoaded,
    #[error("calibrated rewards were asked for, but no calibration is loaded for what scores")]
    CalibrationMissing,
    #[error(
        "{who} has no calibration, and only {seen} of its samples were seen here ({} are enough): \
         `warm calibrate` writes a file for `calibration.file`",
        super::members::MIN_RUNNING
    )]
    ScaleMissing { who: String, seen: u64 },
    #[error("sample {index}: {failure}")]
    Strict { index: usize, failure: Failure },
    #[error("the device worker has stopped")]
    WorkerGone,
    /// The forward pass or another step failed inside; the details are for the log.
    #[error("{0}")]
    Forward(String),
    /// A mistake of the caller in this field.
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
}

impl EngineError {
    pub(super) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }
}

impl From<Shed> for EngineError {
    fn from(shed: Shed) -> Self {
        match shed.reason {
            ShedReason::Draining => Self::Draining { retry_after: shed.retry_after },
            ShedReason::TooLarge => Self::invalid("samples", shed.message),
            ShedReason::Requests
            | ShedReason::Bytes
            | ShedReason::Tokens
            | ShedReason::Share
            | ShedReason::Deadline
            | ShedReason::Queue => Self::Overloaded { message: shed.message, retry_after: shed.retry_after },
        }
    }
}

impl From<ScorerError> for EngineError {
    fn from(error: ScorerError) -> Self {
        match error {
            ScorerError::Full { message, retry_after } => Self::Overloaded { message, retry_after },
            ScorerError::WorkerGone => Self::WorkerGone,
            ScorerError::Forward(problem) => Self::Forward(problem),
        }
    }
}

fn join(names: &[MemberName]) -> String {
    names.iter().map(MemberName::as_str).collect::<Vec<_>>().join(", ")
}
