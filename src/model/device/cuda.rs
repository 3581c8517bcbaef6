//! What the CUDA driver says of its devices, and what is asked of it beside computing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::cuda::cudarc::driver::{CudaContext, DriverError, PinnedHostSlice};

use super::{Card, raw};
use crate::lock::lock;

/// How many cards there are. Touches none of them.
pub fn count() -> Result<usize, String> {
    let count = CudaContext::device_count().map_err(|error| format!("no NVIDIA driver answers, or it has no device ({:?})", error.0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// What the driver says of a card.
pub fn card(ordinal: usize) -> Result<Card, String> {
    let describe = || {
        let context = context(ordinal)?;
        let (major, minor) = context.compute_capability()?;
        let (free, total) = context.mem_get_info()?;
        Ok(Card {
            device: format!("cuda:{ordinal}"),
            name: context.name()?,
            compute_capability: format!("{major}.{minor}"),
            free_bytes: free as u64,
            total_bytes: total as u64,
        })
    };
    describe().map_err(|error: DriverError| format!("{:?}", error.0))
}

/// Waits until every stream of every thread has done what it was given, and gives freed memory back.
pub fn settle(ordinal: usize) -> Result<(), String> {
    let settle = || {
        let context = context(ordinal)?;
        context.synchronize()?;
        raw::trim(&context)
    };
    settle().map_err(|error: DriverError| format!("{:?}", error.0))
}

/// Words of 32 bits on pages of the host that stay where they are.
pub type Pinned = PinnedHostSlice<u32>;

pub fn pinned(ordinal: usize, words: usize) -> Result<Pinned, String> {
    context(ordinal).and_then(|context| raw::pinned(&context, words)).map_err(|error| format!("{:?}", error.0))
}

pub fn length(pinned: &Pinned) -> usize {
    pinned.len()
}

pub fn words(pinned: &mut Pinned) -> Result<&mut [u32], String> {
    pinned.as_mut_slice().map_err(|error| format!("{:?}", error.0))
}

/// The card's own context, kept once it is there: whoever looks again and again would make it anew each time.
fn context(ordinal: usize) -> Result<Arc<CudaContext>, DriverError> {
    static CONTEXTS: Mutex<BTreeMap<usize, Arc<CudaContext>>> = Mutex::new(BTreeMap::new());
    let mut contexts = lock(&CONTEXTS);
    if let Some(context) = contexts.get(&ordinal) {
        return Ok(Arc::clone(context));
    }
    let context = CudaContext::new(ordinal)?;
    if let Err(error) = raw::keep(&context) {
        tracing::debug!(?error, ordinal, "memory goes back to the driver after every forward");
    }
    contexts.insert(ordinal, Arc::clone(&context));
    Ok(context)
}
