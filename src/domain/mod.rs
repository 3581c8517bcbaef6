//! Facts of the problem, without I/O and without async: what is judged, what a score is, what an ensemble says.

mod build;
mod conversation;
mod ensemble;
mod ids;
mod moments;
mod score;

pub use build::{COMMIT, VERSION};
pub use conversation::{Completion, Conversation, InvalidInput, Prompt, PromptGroup, Sample, Turn, json_bytes};
pub use ensemble::{DEFAULT_UWO_LAMBDA, EnsembleStats, GroupAgreement, MemberScale, PairAgreement, kendall_tau_b};
pub use ids::{Fingerprint, GenerationId, InvalidMemberName, MemberName, WeightsId};
pub use moments::{JointMoments, Moments};
pub use score::{Failure, FailureKind, NonFinite, Score, ScoreDetails, Scored, Step, Truncation};
