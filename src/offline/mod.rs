//! The same layers without a network: lines of JSON in, lines of JSON out. Through [`crate::client`] the scorer may also be
//! a running server.

mod compare;
mod device_plan;
mod explain;
mod golden;
mod jsonl;
mod lines;
mod measure;
mod plan;
mod score;
mod verify;
mod workload;

pub use compare::{CompareLines, Compared, Measured, compare_lines, measure_lines};
pub use device_plan::{DevicePlan, DeviceRequest};
pub use explain::explain;
pub use golden::{Case, Expected, Golden, GoldenError};
pub use jsonl::{Input, Item, LineError, Preference, parse_line};
pub use measure::measure;
pub use plan::{Peaks, PlanSummary, Source};
pub use score::{OfflineError, ScoreOptions, Scorer, Summary, score_lines};
pub use verify::{Table, Verified, VerifyOptions, key_of, verify};
pub use workload::{Rate, StepPlan, Workload};
