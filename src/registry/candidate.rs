//! What a reload is made of: where candidates come from, what is wanted of them, and what is told of it.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::canary::{CanaryBounds, Probes};
use super::room::Swap;
use super::{Described, Generation, GenerationState, Progress, ReloadOutcome};
use crate::domain::{Fingerprint, GenerationId};

/// When a loaded candidate becomes the live generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// As soon as it has passed the canary.
    #[default]
    OnLoad,
    /// When somebody says so: a reload only stages.
    OnCall,
}

/// Settings of the reloader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReloadOptions {
    pub swap: Swap,
    pub activation: Activation,
    /// How long requests may hold a generation whose memory is needed.
    pub drain: Duration,
    /// Threads that read, merge and hash.
    pub threads: usize,
}

impl Default for ReloadOptions {
    fn default() -> Self {
        Self { swap: Swap::default(), activation: Activation::default(), drain: Duration::from_secs(30), threads: 1 }
    }
}

/// Where candidates come from.
pub trait Source: Send + Sync {
    /// Reads what is wanted now, and plans it.
    fn prepare(&self, progress: &mut dyn FnMut(Progress)) -> Result<Box<dyn Candidate>, String>;

    /// Plans once more what was live last: for when it had to go before its successor was there.
    fn last_good(&self, progress: &mut dyn FnMut(Progress)) -> Result<Box<dyn Candidate>, String>;

    /// A generation has become the live one.
    fn accepted(&self, generation: &Generation);
}

/// A plan that could become a generation. Reading runs in the current rayon pool.
pub trait Candidate: Send + Sync {
    /// The plan, for people.
    fn summary(&self) -> String;

    /// Changed settings that this reload does not take up, as sentences.
    fn restart_needed(&self) -> &[String];

    /// The name that the generation will have.
    fn fingerprint(&self, progress: &mut dyn FnMut(Progress)) -> Result<Fingerprint, String>;

    /// What stands beside the merged model (see [`Generation::equipment`]). Asked after the fingerprint.
    fn equipment(&self) -> Result<String, String>;

    /// Bytes of weights on the device.
    fn device_bytes(&self) -> u64;

    /// Bytes that its prefix caches hold once it is live, at most.
    fn prefix_bytes(&self) -> u64;

    /// What it is asked before it goes live, and how it must answer.
    fn canary(&self) -> (&Probes, &CanaryBounds);

    /// Loads it, and lets every model answer.
    fn load(&self, id: GenerationId, progress: &mut dyn FnMut(Progress)) -> Result<Generation, String>;
}

/// What a caller wants of one reload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReloadRequest {
    /// Plan and name only; nothing is loaded.
    pub dry_run: bool,
    /// Load and check, but leave the live generation live.
    pub stage_only: bool,
}

/// One step of a reload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadStep {
    /// `download PLACE`, `plan`, `hash`, `room`, `release`, `drain`, `merge`, `member NAME`, `warm-up`, `canary`, `swap` or `stage`.
    pub stage: String,
    /// Bytes where `total` is a number of bytes, else steps.
    pub done: u64,
    pub total: u64,
    /// For people; may be empty.
    pub message: String,
}

/// How a reload ended that did not fail.
#[derive(Clone, Debug, PartialEq)]
pub struct ReloadReport {
    /// `None` for a dry run.
    pub outcome: Option<ReloadOutcome>,
    pub message: String,
    /// What it is about, where its weights are here.
    pub generation: Option<(Described, GenerationState)>,
}

/// Why a reload ended without a new generation. The live one stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ReloadFailure {
    pub outcome: ReloadOutcome,
    pub message: String,
}

/// Another reload is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a reload is running already")]
pub struct ReloadRunning;

/// A reload under way. It goes on when this is dropped.
#[derive(Debug)]
pub struct Reload {
    pub steps: mpsc::UnboundedReceiver<ReloadStep>,
    pub end: oneshot::Receiver<Result<ReloadReport, ReloadFailure>>,
}

/// Bytes of free memory, where the system tells.
pub type FreeMemory = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// Tokens that packs of a generation may have, which is loaded and not live yet, where so many bytes beside it will be free.
pub type FitPacks = Box<dyn Fn(&Generation, u64) -> usize + Send + Sync>;

impl From<Progress> for ReloadStep {
    fn from(progress: Progress) -> Self {
        Self { stage: progress.stage, done: progress.done, total: progress.total, message: String::new() }
    }
}
