//! The merged model, from the cache where it was kept, else from all members. A cache that fails costs time and a line in
//! the log, never the load.

use std::sync::Arc;

use super::LoadError;
use crate::checkpoint::{SourceError, TensorSource};
use crate::clock::Clock;
use crate::domain::WeightsId;
use crate::merge::{Cache, CacheOptions, Cached, MergePlan, Merged, Slot};
use crate::model::RewardModel;

/// A loaded model and the name of its weights.
pub(super) struct MergedModel {
    pub model: Arc<dyn RewardModel>,
    pub weights_id: WeightsId,
    /// The content hash of every member.
    pub members: Vec<[u8; 32]>,
    /// What was not known before weights were read.
    pub notes: Vec<String>,
    pub cache: CacheUse,
}

/// What the cache of merged weights had to do with a load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CacheUse {
    /// There is none.
    #[default]
    Off,
    /// The weights were there.
    Found,
    /// They were merged, and are kept.
    Kept,
    /// They were merged, and another process is keeping them.
    Busy,
    /// They were merged, and cannot be kept: why.
    Failed(String),
}

impl CacheUse {
    /// All labels of metrics.
    pub const NAMES: [&str; 5] = ["off", "found", "kept", "busy", "failed"];

    pub fn name(&self) -> &'static str {
        let [off, found, kept, busy, failed] = Self::NAMES;
        match self {
            Self::Off => off,
            Self::Found => found,
            Self::Kept => kept,
            Self::Busy => busy,
            Self::Failed(_) => failed,
        }
    }

    fn failed(error: impl ToString) -> Self {
        let problem = error.to_string();
        tracing::warn!(problem, "merged weights cannot be kept");
        Self::Failed(problem)
    }
}

/// Makes a model of a source.
pub(super) type Load<'l> = &'l mut dyn FnMut(&dyn TensorSource) -> Result<Arc<dyn RewardModel>, LoadError>;

/// Makes the merge of the plan, or gives it back where it was made already.
pub(super) type Merge<'m> = &'m dyn Fn() -> Result<Arc<Merged>, SourceError>;

/// The name of a plan's merged weights and the content hashes of its members, as the cache remembers them without reading.
pub(super) fn remembered(plan: &Arc<MergePlan>, options: Option<&CacheOptions>, clock: &Clock) -> Option<(WeightsId, Vec<[u8; 32]>)> {
    Cache::open(options?, clock.clone()).ok()?.slot(plan)?.remembered()
}

pub(super) fn load_merged(
    plan: &Arc<MergePlan>,
    merged: Merge<'_>,
    options: Option<&CacheOptions>,
    clock: &Clock,
    load: Load<'_>,
) -> Result<MergedModel, LoadError> {
    let Some(options) = options else { return merge(&*merged()?, CacheUse::Off, load) };
    let cache = match Cache::open(options, clock.clone()) {
        Ok(cache) => cache,
        Err(error) => return merge(&*merged()?, CacheUse::failed(error), load),
    };
    // One checkpoint lies ready already.
    let Some(slot) = cache.slot(plan) else { return merge(&*merged()?, CacheUse::Off, load) };
    match slot.find().and_then(|cached| from_cache(cached, load)) {
        Some(model) => Ok(model),
        None => merge_and_keep(&slot, &merged()?, load),
    }
}

/// `None` where the entry turned out to be broken.
fn from_cache(cached: Cached<'_>, load: Load<'_>) -> Option<MergedModel> {
    let loaded = load(&cached).map_err(|error| error.to_string()).and_then(|model| cached.verify().map(|()| model));
    match loaded {
        Ok(model) => {
            let (weights_id, members, notes) = (cached.weights_id(), cached.member_hashes().to_vec(), cached.notes().to_vec());
            tracing::info!(%weights_id, "merged weights come from the cache");
            Some(MergedModel { model, weights_id, members, notes, cache: CacheUse::Found })
        }
        Err(problem) => {
            cached.discard(&problem);
            None
        }
    }
}

fn merge(merged: &Merged, cache: CacheUse, load: Load<'_>) -> Result<MergedModel, LoadError> {
    let model = load(merged)?;
    name(merged, model, cache)
}

/// After loading, when every block has been hashed as it was read.
fn name(merged: &Merged, model: Arc<dyn RewardModel>, cache: CacheUse) -> Result<MergedModel, LoadError> {
    let (weights_id, members, mut notes) = (merged.weights_id()?, merged.member_hashes()?, merged.notes());
    if let CacheUse::Failed(problem) = &cache {
        notes.push(format!("the merged weights are not kept: {problem}"));
    }
    Ok(MergedModel { model, weights_id, members, notes, cache })
}

fn merge_and_keep(slot: &Slot<'_>, merged: &Arc<Merged>, load: Load<'_>) -> Result<MergedModel, LoadError> {
    let recorder = match slot.record(merged) {
        Ok(Some(recorder)) => recorder,
        Ok(None) => {
            tracing::info!("another process is keeping the same merged weights");
            return merge(merged, CacheUse::Busy, load);
        }
        Err(error) => return merge(merged, CacheUse::failed(error), load),
    };
    let model = load(&recorder)?;
    let cache = match slot.keep(recorder, merged) {
        Ok(()) => {
            tracing::info!("merged weights are kept in the cache");
            CacheUse::Kept
        }
        Err(error) => CacheUse::failed(error),
    };
    name(merged, model, cache)
}
