//! Lines in, scores out, in order: read in chunks that are scored like requests, with a few chunks under way, so that
//! memory is bounded whatever the length of the input.

use std::collections::VecDeque;
use std::io::{BufRead, Read, Write};

use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use super::jsonl::{Input, Item, parse_line};
use crate::client::{Client, ClientError, sample_to_wire};
use crate::domain::{Failure, Sample, Scored, Truncation};
use crate::registry::{CallOptions, CompareOptions, Engine, EngineError};
use crate::scorer::Permit;
use crate::wire;

/// The longest line that is read.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// A chunk ends with the line that fills it.
const CHUNK_SAMPLES: usize = 256;
const CHUNK_BYTES: usize = 4 << 20;
/// Chunks under way: while one is in the forward, the next is tokenised.
const CHUNKS_AHEAD: usize = 2;

/// Why scoring ended early. What was written before is complete lines.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error("line {line}: {problem}")]
    Line { line: u64, problem: String },
    #[error("cannot read the input: {0}")]
    Read(std::io::Error),
    #[error("cannot write the output: {0}")]
    Write(std::io::Error),
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
type Row = Map<String, Value>;

/// Scores every line of `input`. Needs a multi-threaded tokio runtime. Blank lines are skipped.
pub async fn score_lines(
    mut input: impl BufRead,
    mut output: impl Write,
    scorer: &Scorer,
    options: ScoreOptions,
) -> Result<Summary, OfflineError> {
    let mut summary = Summary::default();
    let mut under_way: VecDeque<Chunk> = VecDeque::new();
    let mut line = 0;
    let mut end = None;
    while end.is_none() {
        let items = match read_chunk(&mut input, &mut line) {
            (items, Ok(more)) => {
                end = (!more).then_some(Ok(()));
                items
            }
            // What stands before a bad line is still scored and written.
            (items, Err(error)) => {
                end = Some(Err(error));
                items
            }
        };
        if !items.is_empty() {
            under_way.push_back(Chunk::start(items, scorer.clone(), options));
        }
        while under_way.len() >= CHUNKS_AHEAD {
            finish(&mut under_way, &mut output, &mut summary).await?;
        }
    }
    while !under_way.is_empty() {
        finish(&mut under_way, &mut output, &mut summary).await?;
    }
    output.flush().map_err(OfflineError::Write)?;
    end.unwrap_or(Ok(())).map(|()| summary)
}

/// Lines that are scored together.
struct Chunk {
    /// The id of each line, and its completions if it is a group.
    shape: Vec<(Option<Value>, Option<usize>)>,
    rows: JoinHandle<Result<Vec<Row>, OfflineError>>,
}

impl Chunk {
    fn start(items: Vec<Item>, scorer: Scorer, options: ScoreOptions) -> Self {
        let mut samples = Vec::new();
        let shape = items.into_iter().map(|Item { id, input }| match input {
            Input::One(sample) => {
                samples.push(sample);
                (id, None)
            }
            Input::Group(group) => {
                samples.extend(group.samples());
                (id, Some(group.completions().len()))
            }
        });
        let shape = shape.collect();
        Self { shape, rows: tokio::spawn(async move { rows(&scorer, samples, options).await }) }
    }
}

async fn finish(under_way: &mut VecDeque<Chunk>, output: &mut impl Write, summary: &mut Summary) -> Result<(), OfflineError> {
    let Some(chunk) = under_way.pop_front() else { return Ok(()) };
    let rows = chunk.rows.await.map_err(|panic| OfflineError::Panicked(panic.to_string()))??;
    let mut rows = rows.into_iter().inspect(|row| {
        let counter = if row.contains_key("failure") { &mut summary.failed } else { &mut summary.scored };
        *counter += 1;
        summary.tokens += row.get("tokens").and_then(Value::as_u64).unwrap_or(0);
    });
    let mut lines = 0;
    for (id, completions) in chunk.shape {
        let mut object: Row = id.map(|id| ("id".to_owned(), id)).into_iter().collect();
        match completions {
            None => object.extend(rows.next().unwrap_or_default()),
            Some(count) => {
                let scores = rows.by_ref().take(count).map(Value::Object).collect();
                object.insert("scores".to_owned(), Value::Array(scores));
            }
        }
        serde_json::to_writer(&mut *output, &object).map_err(|error| OfflineError::Write(error.into()))?;
        output.write_all(b"\n").map_err(OfflineError::Write)?;
        lines += 1;
    }
    drop(rows);
    summary.lines += lines;
    Ok(())
}

/// Reads until the chunk is full; true if there may be more. What was read before an error comes with it.
fn read_chunk(input: &mut impl BufRead, line: &mut u64) -> (Vec<Item>, Result<bool, OfflineError>) {
    let (mut items, mut samples, mut bytes) = (Vec::new(), 0, 0);
    while samples < CHUNK_SAMPLES && bytes < CHUNK_BYTES {
        let mut buffer = Vec::new();
        let read = match input.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut buffer) {
            Ok(0) => return (items, Ok(false)),
            Ok(read) => read,
            Err(error) => return (items, Err(OfflineError::Read(error))),
        };
        *line += 1;
        let parsed = if read as u64 > MAX_LINE_BYTES {
            Err(format!("expected at most {MAX_LINE_BYTES} bytes"))
        } else {
            match std::str::from_utf8(&buffer) {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => parse_line(text).map_err(|error| error.to_string()),
                Err(error) => Err(format!("expected UTF-8: {error}")),
            }
        };
        match parsed {
            Ok(item) => {
                let completions = match &item.input {
                    Input::One(_) => 1,
                    Input::Group(group) => group.completions().len(),
                };
                samples += completions;
                // A group's prompt stands before each of its completions.
                bytes += read.saturating_mul(completions.div_ceil(8));
                items.push(item);
            }
            Err(problem) => return (items, Err(OfflineError::Line { line: *line, problem })),
        }
    }
    (items, Ok(true))
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
    let truncation = match options.truncation {
        Truncation::Refuse => wire::Truncation::Refuse,
        Truncation::Left => wire::Truncation::Left,
        Truncation::Right => wire::Truncation::Right,
    };
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

fn scored_row(scored: &Scored) -> Row {
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

fn with_members(mut row: Row, names: &[String], rewards: impl Iterator<Item = f32>) -> Row {
    let members: Row = names.iter().cloned().zip(rewards.map(number)).collect();
    row.insert("members".to_owned(), Value::Object(members));
    row
}

fn failed(failure: &Failure) -> Row {
    failure_row(failure.kind.name(), &failure.message)
}

fn failure_row(kind: &str, message: &str) -> Row {
    Row::from_iter([("failure".to_owned(), json!({ "kind": kind, "message": message }))])
}

/// The shortest decimal that reads back as the same float32; its float64 twin would show digits that mean nothing.
fn number(value: f32) -> Value {
    let shortest: Option<f64> = value.to_string().parse().ok();
    shortest.map_or(Value::Null, |value| json!(value))
}

#[cfg(test)]
#[path = "score_tests.rs"]
mod tests;
