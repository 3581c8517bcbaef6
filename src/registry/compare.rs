//! The merged model beside the ensemble of its members: tokenised once, packed once, every model over the same packs.

use super::engine::Row;
use super::generation::Generation;
use super::lanes::Lane;
use super::members::{ScaleSource, Scales};
use super::outcomes::{member, non_finite, resident, reward, scored};
use super::{CallOptions, ComparedPoint, Engine, EngineError, ModelStamp, Timing};
use crate::domain::{
    DEFAULT_UWO_LAMBDA, EnsembleStats, Failure, FailureKind, GroupAgreement, MemberName, MemberScale, PairAgreement, Sample, Score, Scored,
};
use crate::scorer::Permit;

/// What a comparison adds to a call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompareOptions {
    /// Names, in the order wanted; empty for all.
    pub members: Vec<String>,
    /// The weight of the variance in UWO, finite and at least 0; `None` for [`DEFAULT_UWO_LAMBDA`].
    pub uwo_lambda: Option<f64>,
    /// The unit of all rewards, each model's by its own statistics.
    pub scale: MemberScale,
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
    pub scale: MemberScale,
    pub scale_source: ScaleSource,
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
    let scales = Scales::new(&generation, &members, compare.scale)?;
    let run = match lane {
        Some(lane) => engine.run(&generation, lane, samples, options, permit).await?,
        None => {
            let mut run = engine.run(&generation, generation.merged.clone(), samples, options, permit.clone()).await?;
            for name in &members {
                let model = engine.streamed(&generation, name).await?;
                engine.run_again(&mut run, Lane::new([model]), options, permit.clone()).await?;
            }
            run
        }
    };
    let fold = |row: Row| {
        let (compared, raw) = fold(row, &members, &scales, uwo_lambda, options.details)?;
        engine.registry().metrics().rewarded(raw.merged);
        generation.running.push(raw.merged, members.iter().zip(raw.members));
        Ok(compared)
    };
    let outcomes = engine.close(run.rows.into_iter().map(fold).collect(), options)?;
    let point = |compared: &Compared| ComparedPoint {
        merged: compared.merged.reward.get(),
        mean: compared.stats.mean as f32,
        std: compared.stats.std as f32,
    };
    engine.registry().recent().compared(outcomes.iter().flatten().map(point));
    Ok(CompareReply {
        outcomes,
        members,
        stamp: run.stamp,
        timing: run.timing,
        uwo_lambda,
        scale: compare.scale,
        scale_source: scales.source,
    })
}

/// The members asked for, and the lane that runs the merged model and them; no lane where members are streamed.
fn choose(generation: &Generation, names: &[String]) -> Result<(Vec<MemberName>, Option<Lane>), EngineError> {
    let mut chosen: Vec<MemberName> = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let name = member(generation, name)?;
        if chosen.contains(&name) {
            return Err(EngineError::invalid(format!("members[{i}]"), format!("{:?} is named twice", name.as_str())));
        }
        chosen.push(name);
    }
    let all: Vec<MemberName> = match (generation.members_loaded(), generation.members_streamed()) {
        (true, _) => generation.resident().cloned().collect(),
        (false, true) => generation.info.members.iter().map(|member| member.name.clone()).collect(),
        (false, false) => return Err(EngineError::MembersNotLoaded),
    };
    let chosen = if chosen.is_empty() { all.clone() } else { chosen };
    if !generation.members_loaded() {
        return Ok((chosen, None));
    }
    if chosen == all {
        return Ok((chosen, Some(generation.ensemble.clone())));
    }
    // Some of the members: nothing is run that was not asked for.
    let lane = generation.selections.lane(&chosen, || {
        let models = chosen.iter().filter_map(|name| resident(generation, name)).map(|lane| lane.models[0].clone());
        std::iter::once(generation.merged.models[0].clone()).chain(models)
    });
    Ok((chosen, Some(lane)))
}

/// The rewards of one sample before they are scaled.
struct Raw {
    merged: Score,
    members: Vec<Score>,
}

fn fold(row: Row, names: &[MemberName], scales: &Scales, uwo_lambda: f64, details: bool) -> Result<(Compared, Raw), Failure> {
    let (encoding, outputs) = row?;
    let none = || Failure::new(FailureKind::NonFinite, "a model has no output");
    let (merged, members) = outputs.split_first().ok_or_else(none)?;
    let mut merged = scored(&encoding, merged, details)?;
    let within = |name: &MemberName, failure: Failure| Failure { message: format!("member {name}: {}", failure.message), ..failure };
    let members = names.iter().zip(members).map(|(name, output)| reward(output).map_err(|failure| within(name, failure)));
    let raw = Raw { merged: merged.reward, members: members.collect::<Result<_, _>>()? };
    merged.reward = scales.merged(raw.merged).map_err(non_finite)?;
    let scale =
        |(place, (name, raw)): (usize, (&MemberName, &Score))| scales.member(place, *raw).map_err(|error| within(name, non_finite(error)));
    let members = names.iter().zip(&raw.members).enumerate().map(scale).collect::<Result<Vec<_>, _>>()?;
    let stats = EnsembleStats::new(merged.reward, &members, uwo_lambda).ok_or_else(none)?;
    Ok((Compared { merged, members, stats }, raw))
}

/// What merged model and ensemble say of one preference.
pub fn pair_agreement(chosen: &Compared, rejected: &Compared) -> PairAgreement {
    let members = chosen.members.iter().zip(&rejected.members);
    PairAgreement::new(
        [chosen, rejected].map(|side| f64::from(side.merged.reward.get())),
        [chosen.stats.mean, rejected.stats.mean],
        members.map(|(chosen, rejected)| [chosen, rejected].map(|score| f64::from(score.get()))),
    )
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
