//! Of all that is asked of a card's driver, what no safe interface here offers: the pool that memory comes from, kept and
//! trimmed, and pages of the host that stay where they are.

use std::sync::Arc;

use candle_core::cuda::cudarc::driver::{CudaContext, DriverError, PinnedHostSlice, result, sys};

/// Has the card's pool keep freed blocks for later ones, until [`trim`]. By itself it gives them back whenever somebody waits
/// for the card, which is after every forward, and the next one asks the driver for all of them anew.
#[allow(unsafe_code)]
pub fn keep(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut most = u64::MAX;
    // SAFETY: the device is that of a context that is alive, and its pool lives as long as the device. The attribute is a number
    // of 64 bits (cuMemPoolSetAttribute), which is read before the call returns.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut most).cast())
    }
}

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

/// So many words on pages that stay where they are, all zero.
#[allow(unsafe_code)]
pub fn pinned(context: &Arc<CudaContext>, words: usize) -> Result<PinnedHostSlice<u32>, DriverError> {
    // SAFETY: the memory is written as a whole, through its own pointer and for its own length, before anybody reads it.
    unsafe {
        let mut slice = context.alloc_pinned::<u32>(words)?;
        slice.as_mut_ptr()?.write_bytes(0, words);
        Ok(slice)
    }
}
