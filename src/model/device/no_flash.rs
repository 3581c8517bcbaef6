//! In place of `flash.rs` in a build without the feature `flash-attn`.

use candle_core::{DType, Result, Tensor, bail};

use super::super::kernels::attention::Shape;

pub const BUILT: bool = false;

pub fn covers(_: usize, _: bool, _: DType) -> bool {
    false
}

pub fn attend(_: &Shape, _: [&Tensor; 3], _: &[Tensor; 2], _: [usize; 2]) -> Result<Tensor> {
    bail!("this build has no flash attention")
}
