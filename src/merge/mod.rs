//! Many checkpoints to one: the recipe says which and how, the plan checks that it is possible, and [`Merged`] is the
//! outcome, a checkpoint whose tensors are computed when they are read (WARM, 2401.12187, §3.1: `φ_WARM = (1/M) Σ φ_i`;
//! WARP, 2406.16768, §3: SLERP, LITI and EMA).
//!
//! Every method is, tensor by tensor, one linear combination of the members and init in float64, summed in one order and
//! rounded once; methods differ only in the coefficients.

mod adapters;
mod angles;
mod average;
mod cache;
mod choice;
mod combine;
mod compare;
mod content;
mod glob;
mod heads;
mod listing;
mod merged;
mod nested;
mod output;
mod places;
mod plan;
mod planned;
mod present;
mod products;
mod provenance;
mod recipe;
mod recipe_head;
mod report;
mod shards;
mod staging;
mod summary;
mod survey;
mod tracked;
mod weights_id;
mod write;

pub use angles::Group;
pub use cache::{Cache, CacheOptions, Cached, Recorder, Slot};
pub use choice::Treatment;
pub use combine::{Combination, Gram, Step};
pub use glob::Glob;
pub use merged::Merged;
pub use output::{WriteOptions, Written, write_checkpoint};
pub use places::Downloads;
pub use plan::{Input, MergeError, MergePlan, NotServed, Reward, Size};
pub use planned::{PlannedMember, PlannedSource};
pub use present::written_before;
pub use provenance::RECORD_FILE;
pub use recipe::{Coefficients, Granularity, Kind, Member, Method, Recipe, RecipeError, Rule, Take};
pub use report::{Around, Finding, Report, Section, Standing};
pub use staging::FileError;
pub use summary::GroupPlan;
pub use write::{DEFAULT_SHARD_BYTES, Progress, WriteError};

#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod methods_tests;
