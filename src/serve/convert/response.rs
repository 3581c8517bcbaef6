//! Answers: domain to wire.

use crate::domain::{Failure, FailureKind, MemberScale, Scored, Step};
use crate::registry::{Compared, Described, GenerationState, MemberInfo, ModelStamp, ReloadStep, Timing, group_agreement, pair_agreement};
use crate::wire;

/// A scored sample.
fn scored(scored: Scored) -> wire::Score {
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
        steps: scored.steps.into_iter().map(step).collect(),
    }
}

fn step(step: Step) -> wire::Step {
    wire::Step { position: saturating(step.position), outputs: step.outputs, reward: step.reward.get() }
}

/// A sample that cannot be scored.
fn failed(failure: Failure) -> wire::Score {
    use wire::failure::Kind;
    let kind = match failure.kind {
        FailureKind::TooLong => Kind::TooLong,
        FailureKind::TemplateRefused => Kind::TemplateRefused,
        FailureKind::Empty => Kind::Empty,
        FailureKind::NonFinite => Kind::NonFinite,
        FailureKind::Expired => Kind::Expired,
        FailureKind::UnfinishedReasoning => Kind::UnfinishedReasoning,
        FailureKind::UnknownToken => Kind::UnknownToken,
        FailureKind::NothingToRead => Kind::NothingToRead,
    };
    wire::Score { failure: Some(wire::Failure { kind: kind.into(), message: failure.message }), ..Default::default() }
}

/// What came of one sample.
pub fn outcome(outcome: Result<Scored, Failure>) -> wire::Score {
    outcome.map_or_else(failed, scored)
}

/// One sample beside the ensemble; a sample that failed has its failure and nothing else.
pub fn comparison(outcome: Result<Compared, Failure>) -> wire::Comparison {
    let Compared { merged, members, stats } = match outcome {
        Ok(compared) => compared,
        Err(failure) => return wire::Comparison { merged: Some(failed(failure)), ..Default::default() },
    };
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

/// How merged model and members rank the completions of one prompt; those with a failure take no part.
pub fn compare_group(completions: Vec<Result<Compared, Failure>>) -> wire::GroupComparison {
    let agreement = group_agreement(&completions);
    let unranked = vec![0; completions.len()];
    let completions = completions.into_iter().map(comparison).collect();
    let Some(agreement) = agreement else {
        return wire::GroupComparison { completions, votes: unranked, ..Default::default() };
    };
    wire::GroupComparison {
        completions,
        best_by_merged: Some(saturating(agreement.best_by_merged)),
        best_by_mean: Some(saturating(agreement.best_by_mean)),
        kendall_tau: agreement.kendall_tau.map(|tau| tau as f32),
        member_kendall_tau: agreement.member_kendall_tau.iter().map(|tau| tau.unwrap_or(0.0) as f32).collect(),
        votes: agreement.votes.into_iter().map(saturating).collect(),
    }
}

/// What merged model and members say of one preference.
pub fn compare_pair(chosen: Result<Compared, Failure>, rejected: Result<Compared, Failure>) -> wire::PairComparison {
    let mut pair = wire::PairComparison::default();
    if let (Ok(chosen), Ok(rejected)) = (&chosen, &rejected) {
        let agreement = pair_agreement(chosen, rejected);
        pair.p_chosen_merged = Some(agreement.p_chosen_merged as f32);
        pair.p_chosen_mean = Some(agreement.p_chosen_mean as f32);
        pair.votes = Some(saturating(agreement.votes));
        pair.disagree = Some(agreement.disagree);
    }
    wire::PairComparison { chosen: Some(comparison(chosen)), rejected: Some(comparison(rejected)), ..pair }
}

/// The unit of a comparison.
pub fn member_scale(scale: MemberScale) -> wire::MemberScale {
    match scale {
        MemberScale::Raw => wire::MemberScale::Raw,
        MemberScale::Centered => wire::MemberScale::Centered,
        MemberScale::Standardized => wire::MemberScale::Standardized,
    }
}

/// What scored.
pub fn stamp(stamp: ModelStamp) -> wire::ModelStamp {
    wire::ModelStamp {
        fingerprint: stamp.fingerprint.to_string(),
        generation: stamp.generation.0,
        instance: stamp.instance,
        weights_id: stamp.weights_id.to_string(),
    }
}

/// Where the time went.
pub fn timing(timing: Timing) -> wire::Timing {
    let us = |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    wire::Timing {
        queue_us: us(timing.queue),
        tokenize_us: us(timing.tokenize),
        forward_us: us(timing.forward),
        total_us: us(timing.total),
    }
}

/// One step of a reload.
pub fn reload_step(step: ReloadStep) -> wire::ReloadProgress {
    let ReloadStep { stage, done, total, message } = step;
    wire::ReloadProgress { stage, done, total, message, ..Default::default() }
}

fn state(state: GenerationState) -> wire::generation::State {
    use wire::generation::State;
    match state {
        GenerationState::Staged => State::Staged,
        GenerationState::Live => State::Live,
        GenerationState::Held => State::Held,
        GenerationState::Retiring => State::Retiring,
        GenerationState::Gone => State::Gone,
    }
}

/// A generation, as it describes itself.
pub fn generation(generation: &Described, in_state: GenerationState, instance: &str, max_pack_tokens: usize) -> wire::Generation {
    let (info, limits) = (&generation.info, generation.limits);
    let loaded = info.loaded.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    wire::Generation {
        stamp: Some(stamp(generation.stamp(instance))),
        method: info.method.clone(),
        members: info.members.iter().map(member).collect(),
        architecture: info.architecture.clone(),
        dtype: info.dtype.clone(),
        devices: info.devices.clone(),
        max_tokens: saturating(limits.max_tokens),
        max_pack_tokens: saturating(max_pack_tokens.max(limits.max_tokens)),
        outputs: saturating(limits.outputs),
        parameters: limits.parameters,
        device_bytes: generation.device_bytes,
        members_loaded: generation.members_loaded,
        recipe: info.recipe.clone(),
        loaded_unix_ms: i64::try_from(loaded.as_millis()).unwrap_or(i64::MAX),
        state: state(in_state).into(),
        text: Some(wire::TextPolicy {
            bos: info.text.bos.clone(),
            eos: info.text.eos.clone(),
            pooling: info.text.pooling.clone(),
            reasoning: info.text.reasoning.clone(),
            pad_token_id: info.text.pad_token_id,
            template_hash: info.text.template_hash.clone(),
        }),
        calibration: generation.calibration.as_ref().map(|calibration| wire::Calibration {
            mean: calibration.mean(),
            std: calibration.std(),
            samples: calibration.samples(),
            source: calibration.source().to_owned(),
        }),
        output_names: info.output_names.clone(),
        vocabulary: saturating(info.vocabulary),
        head: info.head.clone(),
        notes: info.notes.clone(),
        ensemble: info.ensemble.clone(),
    }
}

fn member(member: &MemberInfo) -> wire::Member {
    wire::Member {
        name: member.name.to_string(),
        coefficient: member.coefficient,
        content_hash: member.content_hash.clone(),
        distance_to_merged: 0.0,
    }
}

/// Counts that fit by construction; a count that does not is shown as the largest number, not wrapped.
fn saturating(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "response_tests.rs"]
mod tests;
