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
    let cache = options.and_then(|options| match Cache::open(options, clock.clone()) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!(%error, "merged weights cannot be kept");
            None
        }
    });
    let slot = cache.as_ref().and_then(|cache| cache.slot(plan));
    let Some(slot) = slot else { return merge(&*merged()?, load) };
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
            Some(MergedModel { model, weights_id, members, notes })
        }
        Err(problem) => {
            cached.discard(&problem);
            None
        }
    }
}

fn merge(merged: &Merged, load: Load<'_>) -> Result<MergedModel, LoadError> {
    let model = load(merged)?;
    name(merged, model)
}

/// After loading, when every block has been hashed as it was read.
fn name(merged: &Merged, model: Arc<dyn RewardModel>) -> Result<MergedModel, LoadError> {
    Ok(MergedModel { model, weights_id: merged.weights_id()?, members: merged.member_hashes()?, notes: merged.notes() })
}

fn merge_and_keep(slot: &Slot<'_>, merged: &Arc<Merged>, load: Load<'_>) -> Result<MergedModel, LoadError> {
    let recorder = match slot.record(merged) {
        Ok(Some(recorder)) => recorder,
        Ok(None) => {
            tracing::info!("another process is keeping the same merged weights");
            return merge(merged, load);
        }
        Err(error) => {
            tracing::warn!(%error, "merged weights cannot be kept");
            return merge(merged, load);
        }
    };
    let model = load(&recorder)?;
    let named = name(merged, model)?;
    match slot.keep(recorder, merged) {
        Ok(()) => tracing::info!(weights_id = %named.weights_id, "merged weights are kept in the cache"),
        Err(error) => tracing::warn!(%error, "merged weights cannot be kept"),
    }
    Ok(named)
}
