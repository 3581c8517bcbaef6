//! What members must have in common about their heads, beside the tensors that are averaged.

use crate::checkpoint::{Architecture, HeadKeys};

/// Why the head of one member cannot be averaged with that of another: a sentence about `theirs`.
pub fn difference(ours: &HeadKeys, theirs: &HeadKeys) -> Option<String> {
    let name = |head: &HeadKeys| head.pooling.map_or("the family's own", |pooling| pooling.name());
    let (expected, found) = (name(ours), name(theirs));
    (ours.pooling != theirs.pooling)
        .then(|| format!("pooling: expected {expected}, found {found}; set `pooling` in the recipe if both were trained the same way"))
}

/// What is worth knowing of the head of a member.
pub fn note(label: &str, architecture: &Architecture) -> Option<String> {
    architecture.head.normal.map(|(mean, std)| {
        format!(
            "{label}: its config holds mean {mean} and std {std} of its training rewards (OpenRLHF); they are neither averaged nor used: \
             rewards are raw, unless `calibration.from_config` is set for a single member"
        )
    })
}
