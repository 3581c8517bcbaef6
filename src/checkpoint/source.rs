//! The seam between files and models: a checkpoint whose tensors are read, or computed when they are read.

use std::ops::Range;

use super::{Elements, Manifest};

/// Why a tensor could not be read: the place, what was expected and what was found.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// Reading failed, or the file is no longer what its header said.
    #[error("{file}: tensor {tensor:?}: {problem}")]
    Read { file: String, tensor: String, problem: String },
    /// A value that is NaN or infinite.
    #[error("{file}: tensor {tensor:?}: element {index} is {value}, expected finite numbers")]
    NonFinite { file: String, tensor: String, index: usize, value: f64 },
    /// A name or range that the manifest does not have: a mistake of the caller.
    #[error("tensor {tensor:?}: {problem}")]
    NoSuchTensor { tensor: String, problem: String },
}

/// What a checkpoint folder, an adapter on its base, and a merge all are. The model loader cannot tell them apart.
pub trait TensorSource: Send + Sync {
    /// Names, dtypes and shapes of all tensors that [`TensorSource::read`] gives.
    fn manifest(&self) -> &Manifest;

    /// Reads the elements `range` (row-major indices into the flattened tensor) of `name` into `into`, replacing its
    /// content; the variant is that of the manifest's dtype. Floating-point values are checked: a NaN or an infinity is
    /// an error that names the file, the tensor and the element.
    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError>;
}

/// How many elements a caller should ask for at once: large enough to be fast, small enough to keep memory flat.
pub const CHUNK_ELEMENTS: usize = 4 << 20;
