//! Untrusted files in, validated facts out: what lies in a checkpoint folder, without trusting a single number of it.

mod architecture;
mod dtype;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod head_choice;
mod head_config;
mod hf_config;
mod layout;
mod manifest;
mod pooling;
mod reader;
mod readout;
pub mod remote;
mod source;
mod text_facts;

pub use architecture::{
    Activation, Architecture, Convolution, Disentangled, EmbeddingProjection, Experts, LayerKind, Naming, Norm, Positions, ProjectionPlace,
    QkNorm, Residual, Rope, RopeScaling,
};
pub use dtype::{Dtype, Elements};
pub use error::CheckpointError;
pub use head_config::{At, HeadChoice, HeadConfig, Link, RECORD_KEY, Reduce, TokenName, TokenRows, Weights as OutputWeights};
pub(crate) use layout::reads_steps;
pub use layout::{
    BlockKeys, ConvolutionKeys, DenseKeys, Gating, HeadForm, HeadKeys, HeadStage, Layout, LinearKeys, MlpKeys, NormKeys, PartNorms,
    RelativeKeys, RowKeys, Rows, is_recomputed,
};
pub use manifest::{Manifest, TensorInfo};
pub use pooling::Pooling;
pub use reader::{Checkpoint, Folder, Weights};
pub use readout::{Names, Places, Readout};
pub use source::{CHUNK_ELEMENTS, FileStamp, SourceError, TensorSource, look_up};
pub use text_facts::TextFacts;
