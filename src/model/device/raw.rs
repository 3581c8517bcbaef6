//! Of all that is asked of a card's driver, what no safe interface here offers: to trim the pool that memory comes from.

use candle_core::cuda::cudarc::driver::{CudaContext, DriverError, result};

/// Gives back to the driver what the card's pool keeps of freed blocks.
#[allow(unsafe_code)]
pub fn trim(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    // SAFETY: the device is that of a context that is alive, and its pool lives as long as the device. To trim it takes
    // nothing from anybody: only blocks go that nobody holds.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        result::mem_pool::trim_to(pool, 0)
    }
}
