//! Asking a generation what a canary wants to know.
//!
//! A candidate is asked on the thread that loaded it, past the queue: it has no callers yet, and those of the live model
//! must not wait for it. The live model was a candidate once, and answers the same probes with the same bits for as long as
//! it lives, so what it said then is remembered; other probes go through its queue, a few at a time.

use std::sync::{Arc, Mutex};

use super::canary::{Answers, CanaryBounds, Figures, Probes, examine};
use super::outcomes::{answer, scored};
use super::{Generation, LoadError};
use crate::domain::{Sample, Truncation};
use crate::lock::lock;
use crate::model::Pack;

/// Samples of a candidate's canary that are run at once.
const AT_ONCE: usize = 8;

/// What a generation said when it was asked last.
#[derive(Debug, Default)]
pub(super) struct Remembered(Mutex<Option<(Vec<Sample>, Answers)>>);

impl Remembered {
    /// What it said to these samples, if they were the last.
    pub fn recall(&self, samples: &[Sample]) -> Option<Answers> {
        let last = lock(&self.0);
        last.as_ref().filter(|(asked, _)| asked == samples).map(|(_, answers)| answers.clone())
    }

    pub fn remember(&self, samples: &[Sample], answers: &[Option<f32>]) {
        *lock(&self.0) = Some((samples.to_vec(), answers.to_vec()));
    }
}

/// Asks a generation that nobody uses yet, on this thread.
pub(super) fn ask(generation: &Generation, probes: &Probes) -> Result<Answers, String> {
    let encoded: Vec<_> = probes.samples().iter().map(|sample| generation.text.encode(sample, Truncation::Left).map(Arc::new)).collect();
    let readable: Vec<_> = encoded.iter().flatten().cloned().collect();
    let mut outputs = Vec::with_capacity(readable.len());
    for chunk in readable.chunks(AT_ONCE) {
        outputs.extend(generation.merged.models[0].forward(&Pack::new(chunk)).map_err(|error| error.to_string())?);
    }
    let mut outputs = outputs.into_iter();
    let answers: Answers = encoded
        .into_iter()
        .map(|encoding| {
            let encoding = encoding.ok()?;
            answer(scored(&encoding, &outputs.next()?, false))
        })
        .collect();
    generation.answers.remember(probes.samples(), &answers);
    Ok(answers)
}

/// Asks the first generation what a candidate is asked; there is no live one to compare with, so only the bounds that
/// stand alone count.
pub fn first_canary(generation: &Generation, probes: &Probes, bounds: &CanaryBounds) -> Result<Figures, LoadError> {
    let wrong = |problem: String| LoadError::WarmUp { what: "the merged model".to_owned(), problem };
    let answers = ask(generation, probes).map_err(wrong)?;
    examine(&answers, None, probes.preferences(), bounds).map_err(|refused| wrong(refused.to_string()))
}
