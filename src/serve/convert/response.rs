//! Answers: domain to wire.

use crate::domain::{EnsembleStats, Failure, FailureKind, GroupAgreement, Score, Scored, bradley_terry};
use crate::wire;

/// A scored sample.
pub fn scored(scored: Scored) -> wire::Score {
    let details = scored.details.map(|details| wire::ScoreDetails {
        token_ids: details.token_ids,
        pooled_position: saturating(details.pooled_position),
        shared_tokens: saturating(details.shared_tokens),
        rendered: details.rendered,
    });
    wire::Score {
        reward: Some(scored.reward.get()),
        outputs: scored.outputs,
        tokens: saturating(scored.tokens),
        truncated: scored.truncated,
        details,
        failure: None,
    }
}

/// A sample that cannot be scored.
pub fn failed(failure: Failure) -> wire::Score {
    use wire::failure::Kind;
    let kind = match failure.kind {
        FailureKind::TooLong => Kind::TooLong,
        FailureKind::TemplateRefused => Kind::TemplateRefused,
        FailureKind::Empty => Kind::Empty,
        FailureKind::NonFinite => Kind::NonFinite,
        FailureKind::Expired => Kind::Expired,
        FailureKind::UnfinishedReasoning => Kind::UnfinishedReasoning,
        FailureKind::UnknownToken => Kind::UnknownToken,
    };
    wire::Score { failure: Some(wire::Failure { kind: kind.into(), message: failure.message }), ..Default::default() }
}

/// The scores of one group.
pub fn group_scores(scores: Vec<wire::Score>) -> wire::GroupScores {
    wire::GroupScores { scores }
}

/// One sample beside the ensemble.
pub fn compared(merged: Scored, members: &[Score], stats: &EnsembleStats) -> wire::Comparison {
    wire::Comparison {
        merged: Some(scored(merged)),
        member_rewards: members.iter().map(|score| score.get()).collect(),
        mean: Some(stats.mean as f32),
        median: Some(stats.median as f32),
        min: Some(stats.min as f32),
        max: Some(stats.max as f32),
        std: Some(stats.std as f32),
        variance: Some(stats.variance as f32),
        uwo: Some(stats.uwo as f32),
        gap: Some(stats.gap as f32),
        argmin: Some(saturating(stats.argmin)),
    }
}

/// A sample that cannot be compared: it has its failure and nothing else.
pub fn failed_comparison(failure: Failure) -> wire::Comparison {
    wire::Comparison { merged: Some(failed(failure)), ..Default::default() }
}

/// How merged model and members rank the completions of one prompt; those with a failure take no part.
pub fn compare_group(completions: Vec<wire::Comparison>) -> wire::GroupComparison {
    let scored: Vec<usize> = (0..completions.len()).filter(|&i| merged_reward(&completions[i]).is_some()).collect();
    let merged: Vec<f64> = completions.iter().filter_map(merged_reward).collect();
    let member_count = scored.first().map_or(0, |&first| completions[first].member_rewards.len());
    let members: Vec<Vec<f64>> = (0..member_count)
        .map(|m| scored.iter().filter_map(|&i| completions[i].member_rewards.get(m)).map(|&reward| f64::from(reward)).collect())
        .collect();
    let mut votes = vec![0; completions.len()];
    let Some(agreement) = GroupAgreement::new(&merged, &members) else {
        return wire::GroupComparison { completions, votes, ..Default::default() };
    };
    for (&place, &count) in scored.iter().zip(&agreement.votes) {
        votes[place] = saturating(count);
    }
    let place = |best: usize| scored.get(best).copied().map(saturating);
    wire::GroupComparison {
        best_by_merged: place(agreement.best_by_merged),
        best_by_mean: place(agreement.best_by_mean),
        kendall_tau: agreement.kendall_tau.map(|tau| tau as f32),
        member_kendall_tau: agreement.member_kendall_tau.iter().map(|tau| tau.unwrap_or(0.0) as f32).collect(),
        votes,
        completions,
    }
}

/// What merged model and members say of one preference.
pub fn compare_pair(chosen: wire::Comparison, rejected: wire::Comparison) -> wire::PairComparison {
    let (Some(merged_chosen), Some(merged_rejected)) = (merged_reward(&chosen), merged_reward(&rejected)) else {
        return wire::PairComparison { chosen: Some(chosen), rejected: Some(rejected), ..Default::default() };
    };
    let mean = |side: &wire::Comparison| {
        let sum: f64 = side.member_rewards.iter().map(|&reward| f64::from(reward)).sum();
        sum / side.member_rewards.len().max(1) as f64
    };
    let (mean_chosen, mean_rejected) = (mean(&chosen), mean(&rejected));
    let votes = chosen.member_rewards.iter().zip(&rejected.member_rewards).filter(|(chosen, rejected)| chosen > rejected).count();
    wire::PairComparison {
        p_chosen_merged: Some(bradley_terry(merged_chosen, merged_rejected) as f32),
        p_chosen_mean: Some(bradley_terry(mean_chosen, mean_rejected) as f32),
        votes: Some(saturating(votes)),
        disagree: Some((merged_chosen > merged_rejected) != (mean_chosen > mean_rejected)),
        chosen: Some(chosen),
        rejected: Some(rejected),
    }
}

fn merged_reward(comparison: &wire::Comparison) -> Option<f64> {
    comparison.merged.as_ref()?.reward.map(f64::from)
}

/// Counts that fit by construction; a count that does not is shown as the largest number, not wrapped.
fn saturating(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
