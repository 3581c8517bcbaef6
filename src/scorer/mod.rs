//! Devices behind one bounded queue: admission, the pure policy of the queue, and the workers that own a device each.

mod admission;
mod budget;
mod filling;
mod forward;
mod job;
mod line;
mod load;
mod metrics;
mod pace;
mod priority;
mod queue;
mod shares;
mod worker;

pub use admission::{Admission, AdmissionOptions, Permit, Shed, ShedReason};
pub(crate) use forward::panic_message;
pub use job::{Reply, SampleError, ScorerError, ScorerOptions, Submission};
pub use line::ScorerHandle;
pub use load::{Load, Mark};
pub use metrics::{SECONDS_BUCKETS, ScorerMetrics};
#[cfg(all(test, target_os = "linux"))]
pub(crate) use priority::{niceness, stands_last};
pub(crate) use priority::{stand_back_far, stand_last, starved};
pub use queue::{Draw, JobId, NewJob, PRIORITIES, PackLimits, Pick, Queue, QueueBounds, QueueFull};
pub use shares::Caller;
pub use worker::{Worker, crew, pair, spawn};
