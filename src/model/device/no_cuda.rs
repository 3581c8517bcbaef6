//! In place of `cuda.rs` in a build without the feature `cuda`.

use super::Card;

pub fn cards() -> Result<Vec<Card>, String> {
    Err("this build has no CUDA; build with `--features cuda` (or `cuda,flash-attn`), or take the CUDA image".to_owned())
}
