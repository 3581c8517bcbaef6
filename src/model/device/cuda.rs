//! What the CUDA driver says of its devices.

use candle_core::cuda::cudarc::driver::{CudaContext, DriverError};

use super::Card;

/// Every card, by its number.
pub fn cards() -> Result<Vec<Card>, String> {
    let count = CudaContext::device_count().map_err(without_driver)?;
    (0..usize::try_from(count).unwrap_or(0)).map(|ordinal| card(ordinal).map_err(|error| format!("card {ordinal}: {error}"))).collect()
}

fn card(ordinal: usize) -> Result<Card, DriverError> {
    let context = CudaContext::new(ordinal)?;
    let (major, minor) = context.compute_capability()?;
    let (free, total) = context.mem_get_info()?;
    Ok(Card {
        device: format!("cuda:{ordinal}"),
        name: context.name()?,
        compute_capability: format!("{major}.{minor}"),
        free_bytes: free as u64,
        total_bytes: total as u64,
    })
}

fn without_driver(error: DriverError) -> String {
    format!("no NVIDIA driver answers, or it has no device ({:?})", error.0)
}
