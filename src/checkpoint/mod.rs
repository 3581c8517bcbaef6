//! Untrusted files in, validated facts out: what lies in a checkpoint folder, without trusting a single number of it.

mod architecture;
mod dtype;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod hf_config;
mod layout;
mod manifest;
mod reader;
mod source;
mod text_facts;

pub use architecture::{Activation, Architecture, LayerKind, Naming, Norm, Pooling, Residual, Rope, RopeScaling};
pub use dtype::{Dtype, Elements};
pub use error::CheckpointError;
pub use layout::{BlockKeys, HeadStage, Layout, LinearKeys, NormKeys, is_recomputed};
pub use manifest::{Manifest, TensorInfo};
pub use reader::{Checkpoint, Folder, Weights};
pub use source::{CHUNK_ELEMENTS, FileStamp, SourceError, TensorSource, look_up};
pub use text_facts::TextFacts;
