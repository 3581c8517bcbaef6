//! Lines of JSON through a scorer, in order: read in chunks that are scored like requests, with a few chunks under way, so
//! that memory is bounded whatever the length of the input.

use std::collections::VecDeque;
use std::io::{BufRead, Read, Write};

use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::jsonl::{Input, Item, parse_line};
use super::{OfflineError, jsonl};
use crate::domain::Sample;

/// The longest line that is read.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// A chunk ends with the line that fills it.
const CHUNK_SAMPLES: usize = 256;
const CHUNK_BYTES: usize = 4 << 20;
/// Chunks under way: while one is in the forward, the next is tokenised.
const CHUNKS_AHEAD: usize = 2;

/// One line, and what the scorer says of each of its samples.
pub(super) struct Line<T> {
    /// Counted from 1, blank lines too.
    pub number: u64,
    pub id: Option<Value>,
    /// The beginning of its last text, for people.
    pub excerpt: String,
    pub answers: Answers<T>,
}

/// In the shape that the line asked in.
pub(super) enum Answers<T> {
    One(T),
    Group(Vec<T>),
    /// Chosen and rejected.
    Preference([T; 2]),
}

impl<T> Answers<T> {
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Group(group) => group,
            Self::Preference(pair) => pair.as_slice(),
        }
        .iter()
    }
}

/// Scores every line and hands it on, in order. What stands before a bad line is handed on before the error comes. Needs a
/// multi-threaded tokio runtime.
pub(super) async fn each_line<T, F>(
    mut input: impl BufRead,
    score: impl Fn(Vec<Sample>) -> F,
    mut emit: impl FnMut(Line<T>) -> Result<(), OfflineError>,
) -> Result<(), OfflineError>
where
    T: Send + 'static,
    F: Future<Output = Result<Vec<T>, OfflineError>> + Send + 'static,
{
    let mut under_way: VecDeque<Chunk<T>> = VecDeque::new();
    let mut number = 0;
    let mut end = None;
    while end.is_none() {
        let (items, more) = read_chunk(&mut input, &mut number);
        match more {
            Ok(true) => {}
            Ok(false) => end = Some(Ok(())),
            Err(error) => end = Some(Err(error)),
        }
        if !items.is_empty() {
            under_way.push_back(Chunk::start(items, &score));
        }
        while under_way.len() >= CHUNKS_AHEAD {
            finish(&mut under_way, &mut emit).await?;
        }
    }
    while !under_way.is_empty() {
        finish(&mut under_way, &mut emit).await?;
    }
    end.unwrap_or(Ok(()))
}

/// Writes one object on one line.
pub(super) fn write_line(output: &mut impl Write, object: &impl Serialize) -> Result<(), OfflineError> {
    serde_json::to_writer(&mut *output, object).map_err(|error| OfflineError::Write(error.into()))?;
    output.write_all(b"\n").map_err(OfflineError::Write)
}

/// What one line asked for, once its samples are among those of its chunk.
enum Shape {
    One,
    Group(usize),
    Preference,
}

/// A line that is being scored.
struct Asked {
    number: u64,
    id: Option<Value>,
    excerpt: String,
    shape: Shape,
}

/// Lines that are scored together.
struct Chunk<T> {
    lines: Vec<Asked>,
    answers: JoinHandle<Result<Vec<T>, OfflineError>>,
}

impl<T: Send + 'static> Chunk<T> {
    fn start<F>(items: Vec<(u64, Item)>, score: impl Fn(Vec<Sample>) -> F) -> Self
    where
        F: Future<Output = Result<Vec<T>, OfflineError>> + Send + 'static,
    {
        let mut samples = Vec::new();
        let lines = items.into_iter().map(|(number, Item { id, input })| {
            let shape = match input {
                Input::One(sample) => {
                    samples.push(sample);
                    Shape::One
                }
                Input::Group(group) => {
                    samples.extend(group.samples());
                    Shape::Group(group.completions().len())
                }
                Input::Preference(pair) => {
                    let jsonl::Preference { chosen, rejected } = *pair;
                    samples.extend([chosen, rejected]);
                    Shape::Preference
                }
            };
            Asked { number, id, excerpt: samples.last().map(excerpt).unwrap_or_default(), shape }
        });
        let lines = lines.collect();
        Self { lines, answers: tokio::spawn(score(samples)) }
    }
}

/// The beginning of what is judged, on one line.
fn excerpt(sample: &Sample) -> String {
    const CHARS: usize = 60;
    let text = match sample {
        Sample::Conversation(conversation) => conversation.turns().next_back().map_or("", |turn| turn.content()),
        Sample::Text(text) => text,
        Sample::Pair { second, .. } => second,
        Sample::Tokens(ids) => return format!("{} token ids", ids.len()),
    };
    let mut line: String = text.chars().take(CHARS + 1).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.chars().count() > CHARS {
        line = line.chars().take(CHARS - 1).chain(['…']).collect();
    }
    line
}

async fn finish<T>(
    under_way: &mut VecDeque<Chunk<T>>,
    emit: &mut impl FnMut(Line<T>) -> Result<(), OfflineError>,
) -> Result<(), OfflineError> {
    let Some(chunk) = under_way.pop_front() else { return Ok(()) };
    let answers = chunk.answers.await.map_err(|panic| OfflineError::Panicked(panic.to_string()))??;
    let mut answers = answers.into_iter();
    for Asked { number, id, excerpt, shape } in chunk.lines {
        let mut next = || answers.next().ok_or(OfflineError::Short);
        let answers = match shape {
            Shape::One => Answers::One(next()?),
            Shape::Group(count) => Answers::Group((0..count).map(|_| next()).collect::<Result<_, _>>()?),
            Shape::Preference => Answers::Preference([next()?, next()?]),
        };
        emit(Line { number, id, excerpt, answers })?;
    }
    Ok(())
}

/// Reads until the chunk is full; true if there may be more. What was read before an error comes with it.
fn read_chunk(input: &mut impl BufRead, line: &mut u64) -> (Vec<(u64, Item)>, Result<bool, OfflineError>) {
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
                    Input::Preference(_) => 2,
                };
                samples += completions;
                // A group's prompt stands before each of its completions.
                bytes += read.saturating_mul(completions.div_ceil(8));
                items.push((*line, item));
            }
            Err(problem) => return (items, Err(OfflineError::Line { line: *line, problem })),
        }
    }
    (items, Ok(true))
}
