//! Memory of the host from which weights are copied to a device.

use bytemuck::Pod;
use candle_core::{Error, Result};

use super::{Place, cuda, guarded};

/// Room for numbers. A card copies from pages that stay where they are several times as fast as from any others, which its driver
/// copies to such pages first.
pub enum Staging {
    Pinned(cuda::Pinned),
    Pages(Vec<u32>),
}

impl Staging {
    pub fn on(place: Place, bytes: usize) -> Self {
        let Place::Cuda(ordinal) = place else { return Self::Pages(Vec::new()) };
        match guarded(|| cuda::pinned(ordinal, bytes.div_ceil(size_of::<u32>()))) {
            Ok(pinned) => Self::Pinned(pinned),
            Err(problem) => {
                tracing::warn!(device = %place, problem, "weights are copied from pages that may move, which is slower");
                Self::Pages(Vec::new())
            }
        }
    }

    /// Room for so many numbers of at most 32 bits, which are to be written.
    pub fn of<N: Pod>(&mut self, elements: usize) -> Result<&mut [N]> {
        let words = (elements * size_of::<N>()).div_ceil(size_of::<u32>());
        if let Self::Pinned(pinned) = self
            && cuda::length(pinned) < words
        {
            *self = Self::Pages(Vec::new());
        }
        let words = match self {
            Self::Pinned(pinned) => &mut cuda::words(pinned).map_err(Error::Msg)?[..words],
            Self::Pages(pages) => {
                if pages.len() < words {
                    pages.resize(words, 0);
                }
                &mut pages[..words]
            }
        };
        let numbers = bytemuck::try_cast_slice_mut(words).map_err(|problem| Error::Msg(problem.to_string()))?;
        Ok(&mut numbers[..elements])
    }
}
