//! Memory of the host from which weights are copied to a device.

use candle_core::{Error, Result};

use super::{Place, cuda, guarded};

/// Room for 16-bit numbers. A card copies from pages that stay where they are several times as fast as from any others, which
/// its driver copies to such pages first.
pub enum Staging {
    Pinned(cuda::Pinned),
    Pages(Vec<u16>),
}

impl Staging {
    pub fn on(place: Place, elements: usize) -> Self {
        let Place::Cuda(ordinal) = place else { return Self::Pages(Vec::new()) };
        match guarded(|| cuda::pinned(ordinal, elements)) {
            Ok(pinned) => Self::Pinned(pinned),
            Err(problem) => {
                tracing::warn!(device = %place, problem, "weights are copied from pages that may move, which is slower");
                Self::Pages(Vec::new())
            }
        }
    }

    /// Room for so many numbers, which are to be written.
    pub fn of(&mut self, elements: usize) -> Result<&mut [u16]> {
        if let Self::Pinned(pinned) = self
            && cuda::length(pinned) < elements
        {
            *self = Self::Pages(Vec::new());
        }
        match self {
            Self::Pinned(pinned) => Ok(&mut cuda::numbers(pinned).map_err(Error::Msg)?[..elements]),
            Self::Pages(pages) => {
                if pages.len() < elements {
                    pages.resize(elements, 0);
                }
                Ok(&mut pages[..elements])
            }
        }
    }
}
