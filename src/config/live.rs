//! Settings of what happens while the server runs: reloads, and what sets them off.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::layers::{Given, Origin};
use super::{Reader, parse};
use crate::registry::{Activation, CanaryBounds, Swap};

/// How the model is replaced while it is served.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveConfig {
    pub watch: Option<WatchConfig>,
    pub swap: Swap,
    pub activation: Activation,
    /// Generations that are held after they were live.
    pub keep: usize,
    /// Where the last good recipe is remembered; absent: nowhere.
    pub state: Option<PathBuf>,
    /// The operator's own probes; absent: the bundled ones.
    pub canary: Option<PathBuf>,
    pub bounds: CanaryBounds,
    /// The share of prompts that the members score, too.
    pub shadow_share: f64,
    pub shadow_tokens_per_second: usize,
}

/// How files are watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchConfig {
    pub interval: Duration,
    pub settle: Duration,
    /// A file that a checkpoint folder has when it is complete.
    pub marker: Option<String>,
}

/// More would be a fleet in one process.
const MAX_KEEP: u64 = 8;

impl Reader<'_> {
    pub(super) fn live(&mut self, base: &Path) -> LiveConfig {
        let watch = WatchConfig {
            interval: self.get("watch_interval", interval),
            settle: self.get("watch_settle", parse::duration),
            marker: self.get("watch_marker", marker),
        };
        LiveConfig {
            watch: self.get("watch", parse::choice(&[("off", false), ("false", false), ("on", true), ("true", true)])).then_some(watch),
            swap: self.get("swap", parse::choice(&[("beside", Swap::Beside), ("in_place", Swap::InPlace)])),
            activation: self.get("activate", parse::choice(&[("on_load", Activation::OnLoad), ("on_call", Activation::OnCall)])),
            keep: self.get("keep", keep),
            state: self.path("state", base),
            canary: self.path("canary", base),
            bounds: CanaryBounds {
                min_rank_correlation: self.get("canary_min_rank_correlation", parse::within(-1.0, 1.0)),
                max_mean_shift: self.get("canary_max_mean_shift", parse::within(0.0, f64::MAX)),
                max_accuracy_drop: self.get("canary_max_accuracy_drop", parse::within(0.0, 1.0)),
                min_accuracy: self.get("canary_min_accuracy", parse::within(0.0, 1.0)),
            },
            shadow_share: self.get("shadow.share", parse::share),
            shadow_tokens_per_second: self.get("shadow.max_tokens_per_second", parse::count),
        }
    }

    /// An optional path; in a file it is relative to that file.
    fn path(&mut self, key: &'static str, base: &Path) -> Option<PathBuf> {
        let from_file = matches!(self.values.get(key), Some(Given { origin: Origin::File(_), .. }));
        let path = self.get(key, parse::optional_text)?;
        Some(if from_file { base.join(path) } else { PathBuf::from(path) })
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = parse::duration(text)?;
    if interval.is_zero() { Err("expected a time above 0".to_owned()) } else { Ok(interval) }
}

/// The name of a file, without a folder.
fn marker(text: &str) -> Result<Option<String>, String> {
    match text {
        "." | ".." => Err("expected the name of a file".to_owned()),
        _ if text.contains(['/', '\\']) => Err("expected the name of a file inside each checkpoint folder".to_owned()),
        _ => parse::optional_text(text),
    }
}

fn keep(text: &str) -> Result<usize, String> {
    let count = parse::number_from_zero(text).ok().filter(|count| *count <= MAX_KEEP);
    count.and_then(|count| usize::try_from(count).ok()).ok_or_else(|| format!("expected a whole number from 0 to {MAX_KEEP}"))
}
