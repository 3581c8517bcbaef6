//! Which generation is live, and scoring by it.

mod call;
mod canary;
mod candidate;
mod compare;
mod engine;
mod generation;
mod lanes;
mod lease;
mod load;
mod load_thread;
mod members;
mod metrics;
mod outcomes;
mod pool;
mod prepared;
mod probing;
mod recent;
mod reload;
mod room;
mod streamed;
mod table;
mod turns;
mod watch;
mod weights;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

pub use call::{CallOptions, EngineError, ModelStamp, ScoreReply, Timing};
pub use canary::{Answers, CanaryBounds, CanaryError, Figures, MAX_PROBES, Probes, examine};
pub use candidate::{
    Activation, Candidate, FitPacks, FreeMemory, Reload, ReloadFailure, ReloadOptions, ReloadReport, ReloadRequest, ReloadRunning,
    ReloadStep, Source,
};
pub use compare::{CompareOptions, CompareReply, Compared, group_agreement, pair_agreement};
pub use engine::{Engine, EngineOptions, EngineParts};
pub use generation::{
    Calibration, Described, Encode, FingerprintParts, Generation, GenerationInfo, GenerationParts, InvalidCalibration, LoadedMember,
    MemberInfo, SCORE_SEMANTICS, TextInfo,
};
pub use lease::LeaseEnd;
pub use load::{CalibrationChoice, Ensemble, LoadError, LoadSpec, MeasuredMembers, Progress, TextOverrides, open_text};
pub use members::{MIN_RUNNING, ScaleSource, StreamedMembers};
pub use metrics::{RegistryMetrics, ReloadOutcome};
pub use prepared::{Prepared, load_generation, members_on_one_base};
pub use probing::first_canary;
pub use reload::Reloader;
pub use room::Swap;
pub use table::GenerationState;
pub use watch::{ShadowOutcome, Watch, WatchOptions, Watched};
pub use weights::CacheUse;

use crate::domain::{Fingerprint, GenerationId};
use crate::lock::lock;
use crate::model::PrefixBytes;
pub use recent::{ComparedPoint, Problem, Recent, ReloadEvent};
use table::Table;

#[cfg(test)]
mod prefixes_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

/// Holds the generations. Clones are handles of the same; readers pin a generation by its `Arc` and hold no lock.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The same live generation as in `state`, where readers find it without its lock.
    live: tokio::sync::watch::Sender<Option<Arc<Generation>>>,
    state: Mutex<State>,
    last_id: AtomicU64,
    metrics: RegistryMetrics,
    recent: Recent,
}

#[derive(Debug)]
struct State {
    table: Table<Generation>,
    /// What is retiring or gone, the newest first.
    past: VecDeque<(Described, LeaseEnd)>,
}

/// Generations that are gone and still listed, at most.
const MAX_PAST: usize = 16;

/// No generation of this name is staged or held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no generation with fingerprint {asked} is staged or held here; {}", here(.known))]
pub struct NotHere {
    pub asked: Fingerprint,
    pub known: Vec<(Fingerprint, GenerationState)>,
}

fn here(known: &[(Fingerprint, GenerationState)]) -> String {
    let words: Vec<_> = known.iter().map(|(fingerprint, state)| format!("{fingerprint} is {}", state.name())).collect();
    if words.is_empty() { "none is loaded".to_owned() } else { words.join(", ") }
}

impl Registry {
    /// Nothing is live yet. `keep` generations are held after they were live, with their weights on the device.
    pub fn new(metrics: RegistryMetrics, keep: usize) -> Self {
        let state = Mutex::new(State { table: Table::new(keep), past: VecDeque::new() });
        let (live, last_id, recent) = (tokio::sync::watch::Sender::new(None), AtomicU64::new(0), Recent::default());
        Self(Arc::new(Inner { live, state, last_id, metrics, recent }))
    }

    /// The live generation; `None` before the first one, and while one is replaced in place.
    pub fn current(&self) -> Option<Arc<Generation>> {
        self.0.live.borrow().clone()
    }

    /// The generation that scores requests which name this fingerprint: live or held.
    pub fn serving(&self, fingerprint: Fingerprint) -> Option<Arc<Generation>> {
        self.state().table.serving(fingerprint).cloned()
    }

    /// The live generation as it changes: readiness follows it.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<Option<Arc<Generation>>> {
        self.0.live.subscribe()
    }

    /// The number of the next generation of this process.
    pub fn next_id(&self) -> GenerationId {
        GenerationId(self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Makes a generation the live one and gives back the one before, which is held, or goes when its last request ends.
    pub fn install(&self, generation: Generation) -> Option<Arc<Generation>> {
        let before = self.current();
        self.0.metrics.cached(&generation.cache);
        self.change(|table| ((), table.install(Arc::new(generation))));
        before
    }

    /// Keeps a generation ready beside the live one.
    pub fn stage(&self, generation: Generation) -> Arc<Generation> {
        self.0.metrics.cached(&generation.cache);
        let generation = Arc::new(generation);
        self.change(|table| (generation.clone(), table.stage(generation.clone())))
    }

    /// Makes a staged or held generation the live one. The live one may be named, too; then nothing changes.
    pub fn activate(&self, fingerprint: Fingerprint) -> Result<Arc<Generation>, NotHere> {
        self.change(|table| match table.activate(fingerprint) {
            Some((generation, out)) => (Ok(generation), out),
            None => {
                let known = table.all().map(|(generation, state)| (generation.fingerprint, state)).collect();
                (Err(NotHere { asked: fingerprint, known }), Vec::new())
            }
        })
    }

    /// Lets go of what is staged and held; each end says when its memory is free.
    pub fn release(&self) -> Vec<LeaseEnd> {
        self.let_go(Table::release)
    }

    /// Lets go of everything: nothing is live until the next generation is installed.
    pub fn vacate(&self) -> Vec<LeaseEnd> {
        self.let_go(Table::vacate)
    }

    /// Makes a generation the live one again that was let go and has not ended.
    pub(crate) fn come_back(&self, generation: Arc<Generation>) {
        self.state().past.retain(|(described, _)| described.id != generation.id);
        generation.lease.come_back();
        self.change(|table| ((), table.install(generation)));
    }

    fn let_go(&self, which: impl FnOnce(&mut Table<Generation>) -> Vec<Arc<Generation>>) -> Vec<LeaseEnd> {
        self.change(|table| {
            let out = which(table);
            (out.iter().map(|generation| generation.lease.end()).collect(), out)
        })
    }

    /// The generation with this fingerprint, staged, live or held.
    pub fn here(&self, fingerprint: Fingerprint) -> Option<Arc<Generation>> {
        let state = self.state();
        state.table.all().find(|(generation, _)| generation.fingerprint == fingerprint).map(|(generation, _)| generation.clone())
    }

    /// The state of the generation with this fingerprint, if its weights are here.
    pub fn state_of(&self, fingerprint: Fingerprint) -> Option<GenerationState> {
        self.state().table.state(fingerprint)
    }

    /// Everything that this process can still name, the newest first.
    pub fn list(&self) -> Vec<(Described, GenerationState)> {
        let state = self.state();
        let here = state.table.all().map(|(generation, state)| (generation.describe(), state));
        let past = state
            .past
            .iter()
            .map(|(described, end)| (described.clone(), if end.has_come() { GenerationState::Gone } else { GenerationState::Retiring }));
        let mut list: Vec<_> = here.chain(past).collect();
        list.sort_by_key(|(described, _)| std::cmp::Reverse(described.id));
        list
    }

    /// Bytes on the device of the live generation, and of what is staged or held beside it.
    pub fn device_bytes(&self) -> (u64, u64) {
        let state = self.state();
        state.table.all().fold((0, 0), |(live, idle), (generation, state)| match state {
            GenerationState::Live => (live + generation.device_bytes(), idle),
            _ => (live, idle + generation.device_bytes()),
        })
    }

    /// What the prefix caches of the live generation hold, and may hold; no other generation keeps any.
    pub fn prefix_bytes(&self) -> PrefixBytes {
        self.current().map(|live| live.prefix_bytes()).unwrap_or_default()
    }

    pub fn metrics(&self) -> &RegistryMetrics {
        &self.0.metrics
    }

    /// What happened lately.
    pub fn recent(&self) -> &Recent {
        &self.0.recent
    }

    /// One change under the lock: what comes out of the table retires, and what is live is shown to readers before the
    /// lock is released, so that they see changes in their order.
    fn change<T>(&self, change: impl FnOnce(&mut Table<Generation>) -> (T, Vec<Arc<Generation>>)) -> T {
        let (result, out) = {
            let mut state = self.state();
            let before = state.table.live().cloned();
            let (result, out) = change(&mut state.table);
            for generation in &out {
                generation.lease.retire(&self.0.metrics.retiring());
                state.past.push_front((generation.describe(), generation.lease.end()));
            }
            // What retires is always listed, for as long as it takes.
            while state.past.len() > MAX_PAST {
                let Some(oldest) = state.past.iter().rposition(|(_, end)| end.has_come()) else { break };
                state.past.remove(oldest);
            }
            let live = state.table.live().cloned();
            self.0.metrics.show(live.as_deref(), state.table.all().map(|(_, state)| state));
            if before.as_ref().map(Arc::as_ptr) != live.as_ref().map(Arc::as_ptr) {
                before.inspect(|before| before.end_prefixes());
                live.as_ref().inspect(|live| live.begin_prefixes());
                self.0.live.send_replace(live);
            }
            (result, out)
        };
        // Dropped without the lock: it may be the last reference.
        drop(out);
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }
}
