//! The same layers without a network: lines of JSON in, lines of JSON out. Through [`crate::client`] the scorer may also be
//! a running server.

mod compare;
mod explain;
mod golden;
mod jsonl;
mod lines;
mod plan;
mod score;
mod verify;

pub use compare::{CompareLines, Compared, Measured, compare_lines, measure_lines};
pub use explain::explain;
pub use golden::{Case, Expected, Golden, GoldenError};
pub use jsonl::{Input, Item, LineError, Preference, parse_line};
pub use plan::{Peaks, PlanSummary, Source};
pub use score::{OfflineError, ScoreOptions, Scorer, Summary, score_lines};
pub use verify::{Table, Verified, VerifyOptions, key_of, verify};
