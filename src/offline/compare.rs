//! Lines in, comparisons out: the merged model beside its members, as `RewardService.Compare` tells it.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, Write};

use serde_json::{Value, json};

use super::lines::{Answers, Line, each_line, write_line};
use super::score::{Row, failed, failure_row, number, scored_row, truncation_to_wire, with_members};
use super::{OfflineError, Scorer};
use crate::client::sample_to_wire;
use crate::domain::{
    EnsembleStats, Failure, FailureKind, GroupAgreement, MemberName, MemberScale, Moments, Sample, Score, Scored, Step, Truncation,
};
use crate::registry::{self, CallOptions, CompareOptions, group_agreement, pair_agreement};
use crate::scorer::Permit;
use crate::wire;

/// How to compare.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompareLines {
    pub truncation: Truncation,
    pub compare: CompareOptions,
    /// The samples that are kept for the table: those in which merged model and ensemble differ most.
    pub top: usize,
}

/// What was compared, in all.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    pub lines: u64,
    pub failed: u64,
    members: Vec<String>,
    scale_source: String,
    /// Merged less mean.
    gaps: Moments,
    stds: Moments,
    /// Preferences, and how many of them the merged model, the mean and each member got right, a tie counting half.
    pairs: u64,
    right: Vec<f64>,
    groups: u64,
    /// Groups in which merged model and mean put the same completion first.
    same_best: u64,
    top: Vec<Noted>,
}

/// One sample of the table.
#[derive(Clone, Debug)]
struct Noted {
    place: String,
    merged: f32,
    stats: EnsembleStats,
    excerpt: String,
}

/// The names of the members that took part, and the outcome of each sample.
struct Answer {
    members: Vec<String>,
    scale_source: String,
    outcome: Result<registry::Compared, Row>,
}

/// Compares every line of `input`. Needs a multi-threaded tokio runtime.
pub async fn compare_lines(
    input: impl BufRead,
    mut output: impl Write,
    scorer: &Scorer,
    options: CompareLines,
) -> Result<Compared, OfflineError> {
    let mut all = Compared::default();
    let (scorer, top) = (scorer.clone(), options.top);
    let compare = move |samples| {
        let (scorer, options) = (scorer.clone(), options.clone());
        async move { answers(&scorer, samples, &options).await }
    };
    each_line(input, compare, |line: Line<Answer>| {
        all.add(&line, top);
        write_line(&mut output, &object(line))
    })
    .await?;
    output.flush().map_err(OfflineError::Write)?;
    Ok(all)
}

async fn answers(scorer: &Scorer, samples: Vec<Sample>, options: &CompareLines) -> Result<Vec<Answer>, OfflineError> {
    match scorer {
        Scorer::Engine(engine) => {
            let call = CallOptions { truncation: options.truncation, ..CallOptions::default() };
            let reply = engine.compare(samples, call, options.compare.clone(), Permit::unlimited()).await?;
            let members: Vec<String> = reply.members.iter().map(MemberName::to_string).collect();
            let scale_source = reply.scale_source.name().to_owned();
            let answer = |outcome: Result<registry::Compared, Failure>| {
                let outcome = outcome.map_err(|failure| failed(&failure));
                Answer { members: members.clone(), scale_source: scale_source.clone(), outcome }
            };
            Ok(reply.outcomes.into_iter().map(answer).collect())
        }
        Scorer::Remote(client) => {
            let truncation = truncation_to_wire(options.truncation).into();
            let member_scale = match options.compare.scale {
                MemberScale::Raw => wire::MemberScale::Raw,
                MemberScale::Centered => wire::MemberScale::Centered,
                MemberScale::Standardized => wire::MemberScale::Standardized,
            };
            let request = wire::CompareRequest {
                samples: samples.iter().map(sample_to_wire).collect(),
                options: Some(wire::ScoreOptions { truncation, ..Default::default() }),
                members: options.compare.members.clone(),
                uwo_lambda: options.compare.uwo_lambda.map(|lambda| lambda as f32),
                member_scale: member_scale.into(),
                ..Default::default()
            };
            let response = client.compare(request).await?;
            let (members, scale_source, lambda) = (response.members, response.scale_source, f64::from(response.uwo_lambda));
            let answer = |comparison| Answer {
                members: members.clone(),
                scale_source: scale_source.clone(),
                outcome: from_wire(comparison, lambda),
            };
            Ok(response.samples.into_iter().map(answer).collect())
        }
    }
}

/// What a server said, in the domain's words; its statistics follow from the rewards, so they are computed here again.
fn from_wire(comparison: wire::Comparison, uwo_lambda: f64) -> Result<registry::Compared, Row> {
    let merged = comparison.merged.unwrap_or_default();
    if let Some(failure) = merged.failure {
        return Err(failure_row(&failure.kind().as_str_name().to_ascii_lowercase(), &failure.message));
    }
    let score = |reward: f32| Score::try_from(reward).map_err(|error| failure_row("non_finite", &error.to_string()));
    let members = comparison.member_rewards.into_iter().map(score).collect::<Result<Vec<_>, _>>()?;
    let reward = score(merged.reward.unwrap_or(f32::NAN))?;
    let stats = EnsembleStats::new(reward, &members, uwo_lambda).ok_or_else(|| failure_row("non_finite", "no member answered"))?;
    let (tokens, truncated) = (merged.tokens as usize, merged.truncated);
    let steps = merged
        .steps
        .into_iter()
        .map(|step| Ok(Step { position: step.position as usize, reward: score(step.reward)?, outputs: step.outputs }));
    let steps = steps.collect::<Result<_, Row>>()?;
    let merged = Scored { reward, outputs: merged.outputs, steps, tokens, truncated, details: None };
    Ok(registry::Compared { merged, members, stats })
}

/// The line of output.
fn object(line: Line<Answer>) -> Row {
    let mut object: Row = line.id.map(|id| ("id".to_owned(), id)).into_iter().collect();
    match line.answers {
        Answers::One(answer) => object.extend(compared_row(&answer)),
        Answers::Group(answers) => {
            object.insert("scores".to_owned(), answers.iter().map(|answer| Value::Object(compared_row(answer))).collect());
            let names = answers.first().map(|answer| answer.members.clone()).unwrap_or_default();
            if let Some(agreement) = agreement(&answers) {
                let taus = agreement.member_kendall_tau.iter().map(|tau| json!(tau));
                object.insert("best_by_merged".to_owned(), json!(agreement.best_by_merged));
                object.insert("best_by_mean".to_owned(), json!(agreement.best_by_mean));
                object.insert("kendall_tau".to_owned(), json!(agreement.kendall_tau));
                object.insert("member_kendall_tau".to_owned(), Value::Object(names.into_iter().zip(taus).collect()));
                object.insert("votes".to_owned(), json!(agreement.votes));
            }
        }
        Answers::Preference([chosen, rejected]) => {
            for (side, answer) in [("chosen", &chosen), ("rejected", &rejected)] {
                object.insert(side.to_owned(), Value::Object(compared_row(answer)));
            }
            if let (Ok(chosen), Ok(rejected)) = (&chosen.outcome, &rejected.outcome) {
                let agreement = pair_agreement(chosen, rejected);
                object.insert("p_chosen_merged".to_owned(), number(agreement.p_chosen_merged as f32));
                object.insert("p_chosen_mean".to_owned(), number(agreement.p_chosen_mean as f32));
                object.insert("votes".to_owned(), json!(agreement.votes));
                object.insert("disagree".to_owned(), json!(agreement.disagree));
            }
        }
    }
    object
}

/// How the completions of a group rank; what their failures are does not matter for that.
fn agreement(answers: &[Answer]) -> Option<GroupAgreement> {
    let lost = |_| Failure::new(FailureKind::NonFinite, "");
    let outcomes: Vec<_> = answers.iter().map(|answer| answer.outcome.clone().map_err(lost)).collect();
    group_agreement(&outcomes)
}

fn compared_row(answer: &Answer) -> Row {
    let compared = match &answer.outcome {
        Ok(compared) => compared,
        Err(failure) => return failure.clone(),
    };
    let (merged, stats) = (&compared.merged, &compared.stats);
    let mut row = with_members(scored_row(merged), &answer.members, compared.members.iter().map(|score| score.get()));
    let numbers = [
        ("mean", stats.mean),
        ("median", stats.median),
        ("min", stats.min),
        ("max", stats.max),
        ("std", stats.std),
        ("variance", stats.variance),
        ("uwo", stats.uwo),
        ("gap", stats.gap),
    ];
    row.extend(numbers.map(|(name, value)| (name.to_owned(), number(value as f32))));
    let argmin = answer.members.get(stats.argmin).cloned();
    row.insert("argmin".to_owned(), json!(argmin));
    row
}

impl Compared {
    fn add(&mut self, line: &Line<Answer>, top: usize) {
        self.lines += 1;
        for (index, answer) in line.answers.iter().enumerate() {
            if self.members.is_empty() {
                (self.members, self.scale_source) = (answer.members.clone(), answer.scale_source.clone());
            }
            let Ok(compared) = &answer.outcome else {
                self.failed += 1;
                continue;
            };
            self.gaps.push(compared.stats.gap);
            self.stds.push(compared.stats.std);
            let id =
                line.id.as_ref().map_or_else(|| line.number.to_string(), |id| id.as_str().map_or_else(|| id.to_string(), str::to_owned));
            let place = match &line.answers {
                Answers::One(_) => id,
                Answers::Group(_) => format!("{id}[{index}]"),
                Answers::Preference(_) => format!("{id} {}", ["chosen", "rejected"][index.min(1)]),
            };
            let (merged, stats) = (compared.merged.reward.get(), compared.stats);
            self.note(Noted { place, merged, stats, excerpt: line.excerpt.clone() }, top);
        }
        match &line.answers {
            Answers::Preference([Answer { outcome: Ok(chosen), .. }, Answer { outcome: Ok(rejected), .. }]) => {
                let sides = |pick: &dyn Fn(&registry::Compared) -> f64| half_point(pick(chosen), pick(rejected));
                let mut right = vec![sides(&|side| f64::from(side.merged.reward.get())), sides(&|side| side.stats.mean)];
                right.extend((0..chosen.members.len()).map(|member| sides(&|side| f64::from(side.members[member].get()))));
                self.pairs += 1;
                self.right.resize(right.len().max(self.right.len()), 0.0);
                self.right.iter_mut().zip(right).for_each(|(sum, point)| *sum += point);
            }
            Answers::Group(answers) => {
                if let Some(agreement) = agreement(answers) {
                    self.groups += 1;
                    self.same_best += u64::from(agreement.best_by_merged == agreement.best_by_mean);
                }
            }
            Answers::One(_) | Answers::Preference(_) => {}
        }
    }

    /// Keeps the samples with the largest gaps, the first of equals first.
    fn note(&mut self, noted: Noted, top: usize) {
        let after = self.top.partition_point(|kept| kept.stats.gap.abs() >= noted.stats.gap.abs());
        if after < top {
            self.top.insert(after, noted);
            self.top.truncate(top);
        }
    }
}

/// One for the right order, half of one for a tie.
fn half_point(better: f64, worse: f64) -> f64 {
    match better.partial_cmp(&worse) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Equal) => 0.5,
        _ => 0.0,
    }
}

/// The table of the samples in which merged model and ensemble differ most, and what can be said in all.
impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.top.is_empty() {
            let width = self.top.iter().map(|noted| noted.place.chars().count()).max().unwrap_or(0).max(4);
            let members = self.members.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(6);
            writeln!(
                f,
                "{:width$}  {:>8}  {:>8}  {:>7}  {:>8}  {:>8}  {:members$}  text",
                "line", "WARM", "ENS", "std", "worst", "gap", "lowest"
            )?;
            for Noted { place, merged, stats, excerpt } in &self.top {
                let lowest = self.members.get(stats.argmin).map_or("", String::as_str);
                writeln!(
                    f,
                    "{place:width$}  {merged:>8.3}  {:>8.3}  {:>7.3}  {:>8.3}  {:>+8.3}  {lowest:members$}  {excerpt}",
                    stats.mean, stats.std, stats.min, stats.gap
                )?;
            }
        }
        if let (Some(mean), Some(spread), Some(std)) = (self.gaps.mean(), self.gaps.std(), self.stds.mean()) {
            let samples = self.gaps.count();
            writeln!(
                f,
                "{samples} samples, {} failures; WARM - ENS {mean:+.4} (std {spread:.4}), members differ by {std:.4}",
                self.failed
            )?;
            writeln!(f, "statistics of the scale: {}", self.scale_source)?;
        }
        if self.groups > 0 {
            writeln!(f, "{} groups: WARM and ENS put the same completion first in {}", self.groups, self.same_best)?;
        }
        if self.pairs > 0 {
            let names = ["WARM", "ENS"].into_iter().chain(self.members.iter().map(String::as_str));
            let shares = names.zip(&self.right).map(|(name, right)| format!("{name} {:.4}", right / self.pairs as f64));
            writeln!(f, "{} preferences, accuracy: {}", self.pairs, shares.collect::<Vec<_>>().join(", "))?;
        }
        Ok(())
    }
}

/// Where raw rewards lie on a reference set.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub merged: Moments,
    pub members: BTreeMap<String, Moments>,
    pub failed: u64,
}

/// Measures every sample of `input`, answers that were rejected among them. Needs a multi-threaded tokio runtime.
pub async fn measure_lines(input: impl BufRead, scorer: &Scorer, truncation: Truncation) -> Result<Measured, OfflineError> {
    let mut measured = Measured::default();
    let (scorer, options) = (scorer.clone(), CompareLines { truncation, ..CompareLines::default() });
    let compare = move |samples| {
        let (scorer, options) = (scorer.clone(), options.clone());
        async move { answers(&scorer, samples, &options).await }
    };
    each_line(input, compare, |line: Line<Answer>| {
        for answer in line.answers.iter() {
            let Ok(compared) = &answer.outcome else {
                measured.failed += 1;
                continue;
            };
            measured.merged.push(f64::from(compared.merged.reward.get()));
            for (name, reward) in answer.members.iter().zip(&compared.members) {
                measured.members.entry(name.clone()).or_default().push(f64::from(reward.get()));
            }
        }
        Ok(())
    })
    .await?;
    Ok(measured)
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
