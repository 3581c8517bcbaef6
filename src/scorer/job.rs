//! What goes into a scorer and what comes out of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Permit;
use crate::model::{Output, RewardModel};
use crate::text::Encoding;

/// Settings of a scorer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScorerOptions {
    /// Tokens of one forward pass at most, shared ones counted once; at least the longest sample of every model. With
    /// attention counted in, samples that have more in common with the others than apart may bring that to twice as much.
    pub max_pack_tokens: usize,
    pub max_pack_samples: usize,
    pub max_queue_samples: usize,
    pub max_queue_tokens: usize,
    /// What one level of priority is worth in time of arrival.
    pub ageing: Duration,
    /// Devices, each with a worker of its own, which take packs from one queue.
    pub devices: usize,
    /// Threads of the pool that the forwards of one device run in; 0 is one per core.
    pub threads: usize,
    /// How far these threads stand behind all others, so that a busy server still answers, and refuses, at once.
    pub nice: u8,
    /// When a caller that found the queue full should try again.
    pub retry_after: Duration,
}

impl Default for ScorerOptions {
    fn default() -> Self {
        Self {
            max_pack_tokens: 8192,
            max_pack_samples: 1024,
            max_queue_samples: 65_536,
            max_queue_tokens: 8 << 20,
            ageing: Duration::from_secs(1),
            devices: 1,
            threads: 0,
            nice: 5,
            retry_after: Duration::from_secs(1),
        }
    }
}

/// Samples to be scored by the same models.
pub struct Submission {
    /// Run over the same pack, in order.
    pub models: Arc<[Arc<dyn RewardModel>]>,
    /// The identity of `models`: packs never mix lanes.
    pub lane: u64,
    pub encodings: Vec<Arc<Encoding>>,
    pub deadline: Option<Instant>,
    /// Tenants take turns on the device.
    pub tenant: Arc<str>,
    /// Higher first among those of the same tenant; see [`super::PRIORITIES`].
    pub priority: i32,
    pub permit: Permit,
    /// The request's own span, which the packs it rides in refer to.
    pub span: tracing::Span,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Per sample, in order: one output per model, in order.
    pub outcomes: Vec<Result<Vec<Output>, SampleError>>,
    /// The time from submission to reply in which none of its samples was in a forward pass.
    pub queue: Duration,
    /// The time that the packs with its samples took.
    pub forward: Duration,
}

/// Why one sample of a submission has no output.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    #[error("the deadline passed while the sample was queued")]
    Expired,
}

/// Why a submission as a whole has no outputs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScorerError {
    #[error("{message}")]
    Full { message: String, retry_after: Duration },
    #[error("the device worker has stopped")]
    WorkerGone,
    /// A forward pass with one of its samples failed or panicked.
    #[error("{0}")]
    Forward(String),
}
