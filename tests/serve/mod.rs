//! A real server over a socket on this machine.

mod adapters;
#[cfg(unix)]
pub mod binary;
mod connections;
mod deadline;
mod faults;
#[cfg(unix)]
mod fleet;
mod inputs;
#[cfg(unix)]
mod live;
#[cfg(unix)]
mod live_binary;
mod parity;
pub mod running;
#[cfg(unix)]
mod traces;

use std::path::{Path, PathBuf};

/// A family of checkpoints with scores by transformers.
pub fn family() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance/transformers-5/qwen3")
}

pub fn members() -> Vec<PathBuf> {
    (0..3).map(|i| family().join(format!("member-{i}"))).collect()
}

pub fn golden() -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(family().join("golden.json")).expect("golden scores");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    golden["cases"].as_array().expect("cases").clone()
}
