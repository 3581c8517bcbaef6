//! Values of settings that belong together.

use std::path::PathBuf;
use std::time::Duration;

/// What is to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelChoice {
    /// A recipe file.
    RecipeFile(PathBuf),
    /// A recipe that stands in the configuration file; paths in it are relative to `base`.
    Recipe { yaml: String, base: PathBuf },
    /// The uniform average of these folders; of one, the checkpoint itself.
    Folders(Vec<PathBuf>),
}

/// Where merged weights are kept, and how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    pub dir: PathBuf,
    pub max_bytes: usize,
}

/// Which models of the merge are kept loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnsembleMode {
    /// The merged model alone.
    Off,
    /// Every member beside it.
    Resident,
    /// Likewise, but each on one of the devices alone.
    Spread,
    /// Every member beside it, as adapters on their one base, which is loaded once.
    Adapters,
    /// Each member for every call that asks for it, one after another.
    Streamed,
}

/// Where calibrated scores come from.
#[derive(Clone, Debug, PartialEq)]
pub enum CalibrationConfig {
    Given {
        mean: f64,
        std: f64,
        samples: u64,
        source: String,
    },
    /// What `warm calibrate` writes, or a JSON file of the same four.
    File(PathBuf),
    /// The config of a single member.
    FromConfig,
}

/// Bounds on what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionConfig {
    pub max_requests: usize,
    pub max_bytes: usize,
    pub max_tokens: usize,
    pub max_queue: usize,
    pub retry_after: Duration,
}

/// Bounds on one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageConfig {
    pub max_decode: usize,
    pub max_encode: usize,
    pub max_samples: usize,
    pub max_expanded: usize,
}

/// What becomes of text, where the model's own files are not to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextConfig {
    pub bos: String,
    pub eos: String,
    pub reasoning: String,
    pub template: Option<String>,
    pub template_date: Option<jiff::civil::Date>,
}
