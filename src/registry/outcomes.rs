//! From what models put out to scores, and from names to the models that are asked. Pure.

use super::EngineError;
use super::generation::Generation;
use super::lanes::Lane;
use crate::domain::{Failure, FailureKind, MemberName, Score, ScoreDetails, Scored, Step};
use crate::model::{Output, StepOutput};
use crate::scorer::SampleError;
use crate::text::Encoding;

/// What the device said of one sample.
pub(super) fn outcome(outcome: Option<Result<Vec<Output>, SampleError>>) -> Result<Vec<Output>, Failure> {
    match outcome {
        Some(Ok(outputs)) => Ok(outputs),
        Some(Err(error @ SampleError::Expired)) => Err(Failure::new(FailureKind::Expired, error.to_string())),
        None => Err(Failure::new(FailureKind::Expired, "the device worker gave no answer for the sample")),
    }
}

/// A score as a canary wants it.
pub(super) fn answer(scored: Result<Scored, Failure>) -> Option<f32> {
    match scored {
        Ok(scored) => Some(scored.reward.get()),
        Err(failure) if failure.kind == FailureKind::NonFinite => Some(f32::NAN),
        Err(_) => None,
    }
}

pub(super) fn first_failure<T>(outcomes: &[Result<T, Failure>]) -> Result<(), EngineError> {
    let failed = outcomes.iter().enumerate().find_map(|(index, outcome)| Some((index, outcome.as_ref().err()?)));
    failed.map_or(Ok(()), |(index, failure)| Err(EngineError::Strict { index, failure: failure.clone() }))
}

/// The lane of a member that stands on the device.
pub(super) fn resident<'a>(generation: &'a Generation, name: &MemberName) -> Option<&'a Lane> {
    generation.resident.iter().find(|(member, _)| member == name).map(|(_, lane)| lane)
}

/// A member that can be asked, by its name.
pub(super) fn member(generation: &Generation, name: &str) -> Result<MemberName, EngineError> {
    let known: Vec<_> = generation.info.members.iter().map(|member| member.name.clone()).collect();
    if let Some(name) = known.iter().find(|member| member.as_str() == name) {
        let here = resident(generation, name).is_some() || generation.members_streamed();
        return if here { Ok(name.clone()) } else { Err(EngineError::MembersNotLoaded) };
    }
    Err(EngineError::UnknownMember { name: name.chars().take(128).collect(), known })
}

pub(super) fn non_finite(error: crate::domain::NonFinite) -> Failure {
    Failure::new(FailureKind::NonFinite, error.to_string())
}

pub(super) fn first(outputs: &[Output]) -> Result<&Output, Failure> {
    outputs.first().ok_or_else(|| Failure::new(FailureKind::NonFinite, "the model has no output"))
}

/// The reward; every number beside it must be finite too.
pub(super) fn reward(output: &Output) -> Result<Score, Failure> {
    let beside = output.values.iter().chain(output.steps.iter().flat_map(|step| step.outputs.iter()));
    if let Some(bad) = beside.copied().find_map(|value| Score::try_from(value).err()) {
        return Err(non_finite(bad));
    }
    Score::try_from(output.reward).map_err(non_finite)
}

pub(super) fn scored(encoding: &Encoding, output: &Output, details: bool) -> Result<Scored, Failure> {
    let reward = reward(output)?;
    let step = |step: &StepOutput| {
        let reward = Score::try_from(step.reward).map_err(non_finite)?;
        Ok(Step { position: step.position, reward, outputs: step.outputs.clone() })
    };
    Ok(Scored {
        reward,
        outputs: if output.values.len() > 1 { output.values.clone() } else { Vec::new() },
        steps: output.steps.iter().map(step).collect::<Result<_, Failure>>()?,
        tokens: encoding.tokens(),
        truncated: encoding.truncated(),
        details: details.then(|| ScoreDetails {
            token_ids: encoding.ids().to_vec(),
            pooled_position: output.pooled_position,
            shared_tokens: output.shared_tokens,
            rendered: encoding.rendered().unwrap_or_default().to_owned(),
        }),
    })
}
