//! Which generation is live, and scoring by it.

mod call;
mod compare;
mod engine;
mod generation;
mod load;
mod metrics;
mod recent;
mod weights;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

pub use call::{CallOptions, EngineError, ModelStamp, ScoreReply, Timing};
pub use compare::{CompareOptions, CompareReply, Compared, group_agreement};
pub use engine::{Engine, EngineOptions, EngineParts};
pub use generation::{
    Calibration, Encode, FingerprintParts, Generation, GenerationInfo, GenerationParts, InvalidCalibration, LoadedMember, MemberInfo,
    SCORE_SEMANTICS, TextInfo,
};
pub use load::{CalibrationChoice, Ensemble, LoadError, LoadSpec, Progress, TextOverrides, load_generation, open_text};
pub use metrics::{RegistryMetrics, ReloadOutcome};
pub use recent::{ComparedPoint, Problem, Recent, ReloadEvent};

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

/// Holds the live generation. Clones are handles of the same; readers pin a generation by its `Arc` and hold no lock.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    live: watch::Sender<Option<Arc<Generation>>>,
    last_id: AtomicU64,
    metrics: RegistryMetrics,
    recent: Recent,
}

impl Registry {
    /// Nothing is live yet.
    pub fn new(metrics: RegistryMetrics) -> Self {
        Self(Arc::new(Inner { live: watch::Sender::new(None), last_id: AtomicU64::new(0), metrics, recent: Recent::default() }))
    }

    /// The live generation; `None` before the first one.
    pub fn current(&self) -> Option<Arc<Generation>> {
        self.0.live.borrow().clone()
    }

    /// The live generation as it changes: readiness follows it.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Generation>>> {
        self.0.live.subscribe()
    }

    /// The number of the next generation of this process.
    pub fn next_id(&self) -> crate::domain::GenerationId {
        crate::domain::GenerationId(self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Makes a generation the live one and gives back the one before, which goes when its last request ends.
    pub fn install(&self, generation: Generation) -> Option<Arc<Generation>> {
        let generation = Arc::new(generation);
        self.0.metrics.show_generation(&generation);
        self.0.live.send_replace(Some(generation))
    }

    pub fn metrics(&self) -> &RegistryMetrics {
        &self.0.metrics
    }

    /// What happened lately.
    pub fn recent(&self) -> &Recent {
        &self.0.recent
    }
}
