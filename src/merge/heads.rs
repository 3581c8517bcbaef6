//! What members must have in common about their heads, beside the tensors that are averaged.

use serde_json::Value;

use crate::checkpoint::{Architecture, HeadChoice, HeadKeys, RECORD_KEY};

/// Why the head of one member cannot be averaged with that of another: a sentence about `theirs`.
pub fn difference(ours: (&HeadKeys, &HeadChoice), theirs: (&HeadKeys, &HeadChoice)) -> Option<String> {
    let name = |head: &HeadKeys| head.pooling.map_or("the family's own", |pooling| pooling.name());
    let (expected, found) = (name(ours.0), name(theirs.0));
    if expected != found {
        return Some(format!("pooling: expected {expected}, found {found}; set `pooling` in the recipe if both were trained the same way"));
    }
    let json = |choice: &HeadChoice| Value::Object(choice.to_json());
    (ours.1 != theirs.1).then(|| {
        let (expected, found) = (json(ours.1), json(theirs.1));
        format!("its config.json records `{RECORD_KEY}: {found}`, expected {expected}; say in the recipe how the head is read")
    })
}

/// Writes into the configuration of a merge how its head is read, where anybody has chosen: whoever reads the merged
/// weights later reads them alike.
pub fn record(choice: &HeadChoice, config: &mut Value) {
    if let Some(fields) = config.as_object_mut() {
        fields.shift_remove(RECORD_KEY);
        let choice = choice.to_json();
        if !choice.is_empty() {
            fields.insert(RECORD_KEY.to_owned(), choice.into());
        }
    }
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
