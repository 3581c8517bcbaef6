//! Wire to domain and back, pure. What comes in is checked here, with every violation of a request named at once; what
//! goes out is only spelled.

mod parsed;
mod request;
mod response;
mod size;
mod violations;

pub use parsed::{Asked, Batch, ConvertLimits, Folded, ParsedCompare, ParsedScore, Shape};
pub use request::{parse_compare, parse_score};
pub use response::{compare_group, compare_pair, comparison, generation, member_scale, outcome, reload_step, stamp, timing};
pub use size::{compare_bytes, score_bytes};
pub use violations::{Violation, Violations};
