//! The merged model beside the ensemble of its members: tokenised once, packed once, every model over the same packs.

use super::engine::{Row, member, reward, scored};
use super::generation::{Generation, Lane};
use super::{CallOptions, ComparedPoint, Engine, EngineError, ModelStamp, Timing};
use crate::domain::{DEFAULT_UWO_LAMBDA, EnsembleStats, Failure, FailureKind, GroupAgreement, MemberName, Sample, Score, Scored};
use crate::scorer::Permit;

/// What a comparison adds to a call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompareOptions {
    /// Names, in the order wanted; empty for all.
    pub members: Vec<String>,
    /// The weight of the variance in UWO, finite and at least 0; `None` for [`DEFAULT_UWO_LAMBDA`].
    pub uwo_lambda: Option<f64>,
}

/// One sample, as the merged model and every member see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    pub merged: Scored,
    /// In the order of [`CompareReply::members`].
    pub members: Vec<Score>,
    pub stats: EnsembleStats,
}

/// One outcome per sample, in order, all of one generation.
#[derive(Clone, Debug, PartialEq)]
pub struct CompareReply {
    pub outcomes: Vec<Result<Compared, Failure>>,
    pub members: Vec<MemberName>,
    pub stamp: ModelStamp,
    pub timing: Timing,
    /// What was used.
    pub uwo_lambda: f64,
}

pub(super) async fn run(
    engine: &Engine,
    samples: Vec<Sample>,
    options: &CallOptions,
    compare: CompareOptions,
    permit: Permit,
) -> Result<CompareReply, EngineError> {
    if options.calibrated {
        return Err(EngineError::invalid("options.scale", "a comparison is in raw rewards; its scale is set by `member_scale`"));
    }
    if options.scorer.as_deref().is_some_and(|name| !name.is_empty()) {
        return Err(EngineError::invalid("options.scorer", "a comparison is of the merged model and its members; see `members`"));
    }
    let uwo_lambda = compare.uwo_lambda.unwrap_or(DEFAULT_UWO_LAMBDA);
    if !uwo_lambda.is_finite() || uwo_lambda < 0.0 {
        return Err(EngineError::invalid("uwo_lambda", format!("expected a finite number of at least 0, found {uwo_lambda}")));
    }
    let generation = engine.pin(options)?;
    let (members, lane) = choose(&generation, &compare.members)?;
    let run = engine.run(&generation, lane, samples, options, permit).await?;
    let fold = |row: Row| {
        let compared = fold(row, &members, uwo_lambda, options.details)?;
        engine.registry().metrics().rewarded(compared.merged.reward);
        Ok(compared)
    };
    let outcomes = engine.close(run.rows.into_iter().map(fold).collect(), options)?;
    let point = |compared: &Compared| ComparedPoint {
        merged: compared.merged.reward.get(),
        mean: compared.stats.mean as f32,
        std: compared.stats.std as f32,
    };
    engine.registry().recent().compared(outcomes.iter().flatten().map(point));
    Ok(CompareReply { outcomes, members, stamp: run.stamp, timing: run.timing, uwo_lambda })
}

/// The members asked for, and the lane that runs the merged model and them.
fn choose(generation: &Generation, names: &[String]) -> Result<(Vec<MemberName>, Lane), EngineError> {
    let mut chosen: Vec<usize> = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let index = member(generation, name)?;
        if chosen.contains(&index) {
            return Err(EngineError::invalid(format!("members[{i}]"), format!("{name:?} is named twice")));
        }
        chosen.push(index);
    }
    if !generation.members_loaded() {
        return Err(EngineError::MembersNotLoaded);
    }
    let all: Vec<usize> = (0..generation.resident.len()).collect();
    if chosen.is_empty() || chosen == all {
        return Ok((generation.resident().cloned().collect(), generation.ensemble.clone()));
    }
    // Some of the members: their packs hold this request alone, and nothing is run that was not asked for.
    let members = chosen.iter().map(|&i| generation.resident[i].0.clone()).collect();
    let models = chosen.iter().map(|&i| generation.resident[i].1.models[0].clone());
    Ok((members, Lane::new(std::iter::once(generation.merged.models[0].clone()).chain(models))))
}

fn fold(row: Row, names: &[MemberName], uwo_lambda: f64, details: bool) -> Result<Compared, Failure> {
    let (encoding, outputs) = row?;
    let none = || Failure::new(FailureKind::NonFinite, "a model has no output");
    let (merged, members) = outputs.split_first().ok_or_else(none)?;
    let merged = scored(&encoding, merged, details)?;
    let within = |name: &MemberName, failure: Failure| Failure { message: format!("member {name}: {}", failure.message), ..failure };
    let members = names.iter().zip(members).map(|(name, output)| reward(output).map_err(|failure| within(name, failure)));
    let members = members.collect::<Result<Vec<_>, _>>()?;
    let stats = EnsembleStats::new(merged.reward, &members, uwo_lambda).ok_or_else(none)?;
    Ok(Compared { merged, members, stats })
}

/// How merged model and ensemble rank the completions of one group, over those that have a score; indices are those of
/// `outcomes`. `None` where none has one.
pub fn group_agreement(outcomes: &[Result<Compared, Failure>]) -> Option<GroupAgreement> {
    let scored: Vec<(usize, &Compared)> =
        outcomes.iter().enumerate().filter_map(|(i, outcome)| Some((i, outcome.as_ref().ok()?))).collect();
    let merged: Vec<f64> = scored.iter().map(|(_, compared)| f64::from(compared.merged.reward.get())).collect();
    let count = scored.first()?.1.members.len();
    let members: Vec<Vec<f64>> =
        (0..count).map(|m| scored.iter().map(|(_, compared)| f64::from(compared.members[m].get())).collect()).collect();
    let dense = GroupAgreement::new(&merged, &members)?;
    let mut votes = vec![0; outcomes.len()];
    for ((i, _), count) in scored.iter().zip(&dense.votes) {
        votes[*i] = *count;
    }
    Some(GroupAgreement { best_by_merged: scored[dense.best_by_merged].0, best_by_mean: scored[dense.best_by_mean].0, votes, ..dense })
}
