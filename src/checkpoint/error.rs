//! Why a checkpoint cannot be used.

/// A checkpoint folder that cannot be read or trusted: the file, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {problem}")]
pub struct CheckpointError {
    /// The file or folder, as it was named.
    pub file: String,
    pub problem: String,
}

impl CheckpointError {
    pub fn new(file: impl std::fmt::Display, problem: impl Into<String>) -> Self {
        Self { file: file.to_string(), problem: problem.into() }
    }
}
