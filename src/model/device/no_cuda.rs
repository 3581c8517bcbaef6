//! In place of `cuda.rs` in a build without the feature `cuda`.

use super::Card;

const NONE: &str = "this build has no CUDA; build with `--features cuda` (or `cuda,flash-attn`), or take the CUDA image";

pub fn count() -> Result<usize, String> {
    Err(NONE.to_owned())
}

pub fn card(_: usize) -> Result<Card, String> {
    Err(NONE.to_owned())
}

pub fn settle(_: usize) -> Result<(), String> {
    Err(NONE.to_owned())
}
