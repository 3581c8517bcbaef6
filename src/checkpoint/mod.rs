//! Untrusted files in, validated facts out: what lies in a checkpoint folder, without trusting a single number of it.

mod dtype;
mod error;
mod hf_config;
mod layout;
mod manifest;
mod reader;
mod source;
mod text_facts;

pub use dtype::{Dtype, Elements};
pub use error::CheckpointError;
pub use hf_config::Architecture;
pub use layout::Layout;
pub use manifest::{Manifest, TensorInfo};
pub use source::{SourceError, TensorSource};
pub use text_facts::TextFacts;
