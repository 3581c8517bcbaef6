//! Attention by the flash kernels (FlashAttention-2, 2307.08691) that candle compiles.

use candle_core::{DType, Result, Tensor};
use candle_flash_attn::flash_attn_varlen_alibi_windowed_softcap;

use super::super::kernels::attention::Shape;

pub const BUILT: bool = true;

/// Whether there are kernels for it: 16-bit numbers, heads of at most 256, and nothing added to the products.
pub fn covers(head_dim: usize, disentangled: bool, weights: DType) -> bool {
    head_dim.is_multiple_of(8) && head_dim <= 256 && !disentangled && matches!(weights, DType::BF16 | DType::F16)
}

/// `[queries, heads, head_dim]` of sequences end to end, of which only the last dimension must be in one piece. The last query of a sequence stands beside its last key.
pub fn attend(shape: &Shape, [queries, keys, values]: [&Tensor; 3], starts: &[Tensor; 2], longest: [usize; 2]) -> Result<Tensor> {
    let beside = shape.window.map(|window| window.saturating_sub(1));
    let ahead = if shape.causal { Some(0) } else { beside };
    flash_attn_varlen_alibi_windowed_softcap(
        queries,
        keys,
        values,
        None,
        &starts[0],
        &starts[1],
        longest[0],
        longest[1],
        shape.scale,
        beside,
        ahead,
        // Of zero, the kernel bends nothing.
        shape.softcap.unwrap_or(0.0),
    )
}
