//! Untrusted files in, validated facts out: what lies in a checkpoint folder, without trusting a single number of it.

mod adapter;
mod architecture;
mod dtype;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod folder;
mod head_choice;
mod head_config;
mod hf_config;
mod layout;
mod manifest;
mod names;
mod pooling;
mod reader;
mod readout;
pub mod remote;
mod source;
mod text_facts;

pub use adapter::{Adapter, Orientation, Origin, Part, Place, Summand, Term, named_base};
pub use architecture::{
    Activation, Architecture, Convolution, Disentangled, EmbeddingProjection, Experts, LayerKind, Naming, Norm, Positions, ProjectionPlace,
    QkNorm, Residual, Rope, RopeScaling,
};
pub use dtype::{Dtype, Elements, widen_bf16, widen_f16};
pub use error::CheckpointError;
pub use folder::{Checkpoint, Folder};
pub use head_config::{At, HeadChoice, HeadConfig, Link, RECORD_KEY, Reduce, TokenName, TokenRows, Weights as OutputWeights};
pub(crate) use layout::reads_steps;
pub use layout::{
    BlockKeys, ConvolutionKeys, DenseKeys, Gating, HeadForm, HeadKeys, HeadStage, Layout, LayoutProblems, LinearKeys, MlpKeys, NormKeys,
    PartNorms, RelativeKeys, RowKeys, Rows,
};
pub use manifest::{Manifest, TensorInfo};
pub use names::is_recomputed;
pub use pooling::Pooling;
pub use reader::Weights;
pub use readout::{Names, Places, Readout};
pub use source::{CHUNK_ELEMENTS, FileStamp, SourceError, TensorSource, look_up};
pub use text_facts::TextFacts;
