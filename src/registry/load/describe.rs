//! What a loaded head is, for people.

use crate::checkpoint::{HeadForm, Layout, Pooling, Readout};
use crate::merge::{MergePlan, Reward};

/// The names of the head's outputs as the first member's config has them, where it says more than their numbers.
pub(super) fn output_names(plan: &MergePlan, layout: &Layout) -> Vec<String> {
    let label = |i: usize| plan.config().pointer(&format!("/id2label/{i}")).and_then(|label| label.as_str()).map(str::to_owned);
    let names = (0..layout.outputs()).map(|i| label(i).unwrap_or_else(|| format!("LABEL_{i}")));
    match layout.head.form {
        HeadForm::Rows(_) => ["plus", "minus"].map(str::to_owned).into_iter().take(layout.outputs()).collect(),
        HeadForm::Stages(_) | HeadForm::Gated(_) => names.collect(),
    }
}

/// What the head is and how its outputs become a reward.
pub(super) fn describe(layout: &Layout, readout: &Readout) -> String {
    let head = &layout.head;
    let at = match readout.step {
        Some(_) => format!("at {}, reduced by {}", place(readout), readout.reduce.name()),
        None => format!("at {}", place(readout)),
    };
    let reward = match (&head.form, readout.weights.as_slice()) {
        (HeadForm::Gated(_), _) => "weighted by the gate".to_owned(),
        (_, []) => "the first is the reward".to_owned(),
        (_, weights) => format!("weighted {}", weights.iter().map(f64::to_string).collect::<Vec<_>>().join(", ")),
    };
    let outputs = layout.outputs();
    let count = if outputs == 1 { "1 output".to_owned() } else { format!("{outputs} outputs, {reward}") };
    format!("{}: {count}, as {}, {at}", head.name, readout.link.name())
}

/// Which tokens are read.
pub(super) fn place(readout: &Readout) -> String {
    match (readout.step, readout.token) {
        (Some(step), _) => format!("each token {step}"),
        (None, Some(token)) => format!("token {token}"),
        (None, None) => readout.pooling.name().to_owned(),
    }
}

/// What an operator should know of the reading, because it is easily meant otherwise.
pub(super) fn remarks(plan: &MergePlan, Reward { architecture, layout, .. }: Reward<'_>, readout: &Readout) -> Vec<String> {
    let mut remarks = Vec::new();
    if layout.outputs() > 1 && readout.weights.is_empty() && !matches!(layout.head.form, HeadForm::Gated(_)) {
        let outputs = layout.outputs();
        remarks.push(format!(
            "the head has {outputs} outputs and the reward is the first of them: `head: {{weights: ...}}` in the recipe combines them"
        ));
    }
    let chosen = architecture.head.choice.pooling.is_some();
    let pad_ends = architecture.pad_token_id.is_some_and(|pad| architecture.eos_token_ids.contains(&pad));
    let version = plan.config().get("transformers_version").and_then(|version| version.as_str()).unwrap_or_default();
    if !chosen && pad_ends && readout.pooling == Pooling::LastNonPad && is_before_2025(version) {
        remarks.push(format!(
            "the pad token ends sequences, and the config was written by transformers {version}, which read the token before the first pad token: \
             a model that was trained that way needs `pooling: first_pad_minus_one`"
        ));
    }
    remarks
}

/// Whether this version of transformers pools before the first pad token: below 4.49.
fn is_before_2025(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>());
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < (4, 49),
        _ => false,
    }
}
