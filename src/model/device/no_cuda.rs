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

/// There are none.
pub enum Pinned {}

pub fn pinned(_: usize, _: usize) -> Result<Pinned, String> {
    Err(NONE.to_owned())
}

pub fn length(pinned: &Pinned) -> usize {
    match *pinned {}
}

pub fn words(pinned: &mut Pinned) -> Result<&mut [u32], String> {
    match *pinned {}
}
