//! Checkpoints that lie on a hub: `hf:org/name@revision[/subdir]` in the place of a folder. They are downloaded into the
//! cache that other tools of the hub use too, and read from there like any folder.
//!
//! Nothing but safetensors, JSON and tokenizer files is fetched, so no code comes along. A revision becomes the commit that
//! it stands for, which is what is remembered. Nothing here is reachable over the wire: a path comes from the recipe alone.

mod download;
mod hub;
mod hub_path;
mod listing;

use std::path::{Path, PathBuf};

pub use hub::{Fetched, Hub};
pub use hub_path::{HubPath, InvalidHubPath};

/// How a path on a hub begins.
const HUB: &str = "hf:";

/// Whether a member's path names a place on a hub and not a folder.
pub fn is_remote(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(HUB))
}

/// A path of a recipe, relative to the recipe's folder unless it is on a hub.
pub fn join(base: &Path, path: &str) -> PathBuf {
    if is_remote(Path::new(path)) { PathBuf::from(path) } else { base.join(path) }
}
