//! Lines in, scores out, in order.

use std::io::{BufRead, Write};

use serde_json::{Map, Value, json};

use super::lines::{Answers, Line, each_line, write_line};
use crate::client::{Client, ClientError, sample_to_wire};
use crate::domain::{Failure, Sample, Scored, Truncation};
use crate::registry::{CallOptions, CompareOptions, Engine, EngineError};
use crate::scorer::Permit;
use crate::wire;

/// Why scoring ended early. What was written before is complete lines.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error("line {line}: {problem}")]
    Line { line: u64, problem: String },
    #[error("cannot read the input: {0}")]
    Read(std::io::Error),
    #[error("cannot write the output: {0}")]
    Write(std::io::Error),
    #[error("the server's answer does not have one score per sample")]
    Short,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("scoring panicked: {0}")]
    Panicked(String),
}

/// What scores: the model in this process, or a running server.
#[derive(Clone)]
pub enum Scorer {
    Engine(Engine),
    Remote(Client),
}

/// How to score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScoreOptions {
    pub truncation: Truncation,
    /// Every member's reward beside the merged model's.
    pub members: bool,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub lines: u64,
    pub scored: u64,
    pub failed: u64,
    pub tokens: u64,
}

/// One sample's part of an output line.
pub(super) type Row = Map<String, Value>;

/// Scores every line of `input`. Needs a multi-threaded tokio runtime. Blank lines are skipped.
pub async fn score_lines(
    input: impl BufRead,
    mut output: impl Write,
    scorer: &Scorer,
    options: ScoreOptions,
) -> Result<Summary, OfflineError> {
    let mut summary = Summary::default();
    let scorer = scorer.clone();
    let score = move |samples| {
        let scorer = scorer.clone();
        async move { rows(&scorer, samples, options).await }
    };
    each_line(input, score, |line: Line<Row>| {
        for row in line.answers.iter() {
            let counter = if row.contains_key("failure") { &mut summary.failed } else { &mut summary.scored };
            *counter += 1;
            summary.tokens += row.get("tokens").and_then(Value::as_u64).unwrap_or(0);
        }
        summary.lines += 1;
        let mut object: Row = line.id.map(|id| ("id".to_owned(), id)).into_iter().collect();
        match line.answers {
            Answers::One(row) => object.extend(row),
            Answers::Group(rows) => _ = object.insert("scores".to_owned(), rows.into_iter().map(Value::Object).collect()),
            Answers::Preference(rows) => {
                object.extend(["chosen", "rejected"].map(str::to_owned).into_iter().zip(rows.map(Value::Object)));
            }
        }
        write_line(&mut output, &object)
    })
    .await?;
    output.flush().map_err(OfflineError::Write)?;
    Ok(summary)
}

async fn rows(scorer: &Scorer, samples: Vec<Sample>, options: ScoreOptions) -> Result<Vec<Row>, OfflineError> {
    match scorer {
        Scorer::Engine(engine) => {
            let call = CallOptions { truncation: options.truncation, ..CallOptions::default() };
            if !options.members {
                let reply = engine.score(samples, call, Permit::unlimited()).await?;
                return Ok(reply
                    .outcomes
                    .into_iter()
                    .map(|outcome| match outcome {
                        Ok(scored) => scored_row(&scored),
                        Err(failure) => failed(&failure),
                    })
                    .collect());
            }
            let reply = engine.compare(samples, call, CompareOptions::default(), Permit::unlimited()).await?;
            let names: Vec<String> = reply.members.iter().map(ToString::to_string).collect();
            let compared = reply.outcomes.into_iter().map(|outcome| match outcome {
                Ok(compared) => with_members(scored_row(&compared.merged), &names, compared.members.iter().map(|score| score.get())),
                Err(failure) => failed(&failure),
            });
            Ok(compared.collect())
        }
        Scorer::Remote(client) => remote_rows(client, &samples, options).await,
    }
}

async fn remote_rows(client: &Client, samples: &[Sample], options: ScoreOptions) -> Result<Vec<Row>, OfflineError> {
    let truncation = truncation_to_wire(options.truncation);
    let samples = samples.iter().map(sample_to_wire).collect();
    let asked = Some(wire::ScoreOptions { truncation: truncation.into(), ..Default::default() });
    if !options.members {
        let response = client.score(wire::ScoreRequest { samples, options: asked, ..Default::default() }).await?;
        return Ok(response.scores.into_iter().map(wire_row).collect());
    }
    let response = client.compare(wire::CompareRequest { samples, options: asked, ..Default::default() }).await?;
    let names = response.members;
    let compared = response.samples.into_iter().map(|comparison| {
        let merged = comparison.merged.unwrap_or_default();
        if merged.failure.is_some() {
            return wire_row(merged);
        }
        with_members(wire_row(merged), &names, comparison.member_rewards.into_iter())
    });
    Ok(compared.collect())
}

pub(super) fn truncation_to_wire(truncation: Truncation) -> wire::Truncation {
    match truncation {
        Truncation::Refuse => wire::Truncation::Refuse,
        Truncation::Left => wire::Truncation::Left,
        Truncation::Right => wire::Truncation::Right,
    }
}

fn wire_row(score: wire::Score) -> Row {
    match score.failure {
        Some(failure) => {
            let kind = failure.kind().as_str_name().to_ascii_lowercase();
            failure_row(&kind, &failure.message)
        }
        None => {
            let steps = score.steps.iter().map(|step| (u64::from(step.position), step.reward, step.outputs.as_slice()));
            row(score.reward.unwrap_or(f32::NAN), &score.outputs, steps, u64::from(score.tokens), score.truncated)
        }
    }
}

pub(super) fn scored_row(scored: &Scored) -> Row {
    let steps = scored.steps.iter().map(|step| (step.position as u64, step.reward.get(), step.outputs.as_slice()));
    row(scored.reward.get(), &scored.outputs, steps, scored.tokens as u64, scored.truncated)
}

/// Steps come as position, reward and outputs.
fn row<'a>(reward: f32, outputs: &[f32], steps: impl Iterator<Item = (u64, f32, &'a [f32])>, tokens: u64, truncated: bool) -> Row {
    let numbers = |values: &[f32]| -> Value { values.iter().copied().map(number).collect() };
    let mut row = Row::from_iter([("reward".to_owned(), number(reward))]);
    if !outputs.is_empty() {
        row.insert("outputs".to_owned(), numbers(outputs));
    }
    let steps: Vec<Value> = steps
        .map(|(position, reward, outputs)| json!({"position": position, "reward": number(reward), "outputs": numbers(outputs)}))
        .collect();
    if !steps.is_empty() {
        row.insert("steps".to_owned(), Value::Array(steps));
    }
    row.insert("tokens".to_owned(), json!(tokens));
    row.insert("truncated".to_owned(), json!(truncated));
    row
}

pub(super) fn with_members(mut row: Row, names: &[String], rewards: impl Iterator<Item = f32>) -> Row {
    let members: Row = names.iter().cloned().zip(rewards.map(number)).collect();
    row.insert("members".to_owned(), Value::Object(members));
    row
}

pub(super) fn failed(failure: &Failure) -> Row {
    failure_row(failure.kind.name(), &failure.message)
}

pub(super) fn failure_row(kind: &str, message: &str) -> Row {
    Row::from_iter([("failure".to_owned(), json!({ "kind": kind, "message": message }))])
}

/// The shortest decimal that reads back as the same float32; its float64 twin would show digits that mean nothing.
pub(super) fn number(value: f32) -> Value {
    let shortest: Option<f64> = value.to_string().parse().ok();
    shortest.map_or(Value::Null, |value| json!(value))
}

#[cfg(test)]
#[path = "score_tests.rs"]
mod tests;
