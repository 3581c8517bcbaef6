//! In place of `flash.rs` in a build without the feature `flash-attn`.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::super::kernels::attention::Shape;
use crate::checkpoint::Architecture;

pub const BUILT: bool = false;

pub fn covers(_: usize, _: bool, _: DType) -> bool {
    false
}

pub fn agrees(_: &Device, _: &Architecture, _: DType) -> std::result::Result<(), String> {
    Err("this build has none".to_owned())
}

pub fn attend(_: &Shape, _: [&Tensor; 3], _: &[Tensor; 2], _: [usize; 2]) -> Result<Tensor> {
    bail!("this build has no flash attention")
}
