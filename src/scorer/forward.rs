//! A pack through the models of its lane on one device, in parts where there is no room for the whole, or where one sample
//! fails: it costs its own request, not those that happen to ride with it.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::budget::{Miss, in_parts};
use super::{Pick, ScorerMetrics};
use crate::model::{ModelError, Output, Pack, RewardModel};
use crate::text::Encoding;

/// Parts of one pack that may fail and be halved all the same: enough to find three bad samples among a thousand. A model that
/// fails whatever it is given is found out soon.
const TRIES: usize = 32;

/// What was drawn to run together, as the jobs have it.
pub struct Drawn {
    pub lane: u64,
    /// In tokens, at most.
    pub cost: usize,
    /// Tokens that are computed, at most.
    pub computed: usize,
    pub picks: Vec<Pick>,
    pub models: Arc<[Arc<dyn RewardModel>]>,
    pub encodings: Vec<Arc<Encoding>>,
    pub span: tracing::Span,
}

impl Drawn {
    /// Tokens of its samples, shared ones each time.
    pub fn tokens(&self) -> usize {
        self.picks.iter().map(|pick| pick.tokens).sum()
    }

    /// Those of its samples alone that `wanted` says yes to.
    pub fn only(mut self, wanted: impl Fn(&Pick) -> bool) -> Self {
        let whole = self.tokens();
        let (picks, encodings) = self.picks.into_iter().zip(self.encodings).filter(|(pick, _)| wanted(pick)).unzip();
        (self.picks, self.encodings) = (picks, encodings);
        // About as much of these as of the tokens.
        let left = self.tokens();
        (self.cost, self.computed) = (portion(self.cost, left, whole), portion(self.computed, left, whole));
        self
    }
}

/// So much of `of` as `some` is of `all`.
fn portion(of: usize, some: usize, all: usize) -> usize {
    (of as u128 * some as u128 / all.max(1) as u128) as usize
}

/// A pack to run, and whose samples it holds.
pub struct Next {
    pub drawn: Drawn,
    /// `Err`: why it could not be made.
    pub pack: Result<Pack, String>,
}

impl Next {
    pub fn new(drawn: Drawn) -> Self {
        let Drawn { models, encodings, .. } = &drawn;
        // The models of a lane are of one architecture, so what may be shared is the same for all of them.
        let make = || Pack::forest(encodings, |tokens| models.first()?.prefix_key(tokens));
        let pack = catch_unwind(AssertUnwindSafe(make)).map_err(|panic| format!("packing panicked: {}", panic_message(panic.as_ref())));
        Self { drawn, pack }
    }

    /// Lets the models make ready on a device what they need there, while another pack is computed. What goes wrong here goes
    /// wrong again when the pack is run.
    pub fn prepare(&self, device: usize) {
        if let Ok(pack) = &self.pack {
            let prepare = || self.drawn.models.iter().for_each(|model| model.prepare(device, pack));
            let _ = catch_unwind(AssertUnwindSafe(prepare));
        }
    }
}

/// What a pack gave.
pub struct Forwarded {
    /// Per sample, one output per model; `Err` where the device has no room for it alone, or its forward failed.
    pub outcomes: Vec<Result<Vec<Output>, String>>,
    /// Tokens of the largest part that was run at once.
    pub largest: usize,
    /// Parts that did not fit.
    pub misfits: usize,
    /// What the pack did cost, where it ran as a whole: less than it was drawn at for what was there from packs before.
    pub cost: Option<usize>,
}

/// The device answers no more, for this reason.
pub struct Lost(pub String);

/// Why a part gave nothing.
enum Fault {
    NoRoom(String),
    Failed(String),
    Panicked(String),
    Lost(String),
}

impl From<ModelError> for Fault {
    fn from(error: ModelError) -> Self {
        let words = error.to_string();
        match error {
            ModelError::OutOfMemory(_) => Self::NoRoom(words),
            ModelError::Failed(_) => Self::Failed(words),
            ModelError::DeviceLost(_) => Self::Lost(words),
        }
    }
}

/// What one model did with the tokens of a pack.
#[derive(Clone, Default)]
struct Tokens {
    computed: usize,
    shared: usize,
    cached: usize,
}

impl Tokens {
    /// Adds a part whose samples have `whole` tokens, of which `cached` were there.
    fn add(&mut self, part: &Pack, whole: usize, there: impl Fn(usize) -> usize) {
        let cached: usize = (0..part.len()).map(&there).sum();
        let computed = part.computed_without(there);
        self.computed += computed;
        self.cached += cached;
        self.shared += whole.saturating_sub(computed + cached);
    }
}

/// All models over one pack, or over parts of it where the device has no room for the whole, or the whole fails.
pub fn forward(next: &Next, device: usize, metrics: &ScorerMetrics) -> Result<Forwarded, Lost> {
    let sizes: Vec<usize> = next.drawn.picks.iter().map(|pick| pick.tokens).collect();
    let mut tokens = vec![Tokens::default(); next.drawn.models.len()];
    let (mut largest, mut misfits, mut failures) = (0, 0, 0);
    // How the first part that failed did so, and the words for it.
    let mut failed: Option<(&str, String)> = None;
    let parts = in_parts(&sizes, |range| {
        let whole: usize = sizes[range.clone()].iter().sum();
        let run = || forward_part(next, device, range.clone(), whole, &mut tokens);
        let caught = catch_unwind(AssertUnwindSafe(run));
        let result = caught.unwrap_or_else(|panic| Err(Fault::Panicked(panic_message(panic.as_ref()).to_owned())));
        let (outcome, words) = match result {
            Ok(outputs) => {
                largest = largest.max(whole);
                return Ok(outputs);
            }
            Err(Fault::Lost(words)) => return Err(Miss::End(Lost(words))),
            Err(Fault::NoRoom(words)) => {
                misfits += 1;
                return Err(Miss::Halve(words));
            }
            Err(Fault::Failed(words)) => ("error", words),
            Err(Fault::Panicked(words)) => ("panic", format!("the forward pass panicked: {words}")),
        };
        failed.get_or_insert_with(|| (outcome, words.clone()));
        failures += 1;
        // A request fails with any of its samples, so parts of one request are not looked into.
        let strangers = next.drawn.picks[range.start].job != next.drawn.picks[range.end - 1].job;
        Err(if strangers && failures <= TRIES { Miss::Halve(words) } else { Miss::Keep(words) })
    });
    metrics.pack_samples.observe(next.drawn.picks.len() as f64);
    let outcome = match (&parts, &failed) {
        (Err(_), _) => "error",
        (_, Some((outcome, _))) => outcome,
        _ if misfits > 0 => "split",
        _ => "ok",
    };
    metrics.packs.with_label_values(&[outcome]).inc();
    let (samples, sent) = (next.drawn.picks.len(), sizes.iter().sum::<usize>());
    let outcomes = parts.inspect_err(|Lost(problem)| tracing::error!(problem, samples, tokens = sent, device, "the device is lost"))?;
    let scored = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    if let Some((_, problem)) = failed {
        tracing::error!(problem, samples, scored, parts = failures, tokens = sent, device, "a pack failed");
    }
    if scored > 0 {
        metrics.pack_tokens.observe(tokens.first().map_or(0, |tokens| tokens.computed) as f64);
    }
    metrics.samples.inc_by(scored as u64);
    let whole = misfits == 0 && failures == 0;
    let cost = whole.then(|| portion(next.drawn.cost, tokens.first().map_or(0, |tokens| tokens.computed), next.drawn.computed));
    for Tokens { computed, shared, cached } in tokens {
        metrics.tokens_computed.inc_by(computed as u64);
        metrics.tokens_shared.inc_by(shared as u64);
        metrics.tokens_cached.inc_by(cached as u64);
    }
    Ok(Forwarded { outcomes, largest, misfits, cost })
}

/// All models over some samples of a pack, of `whole` tokens; `tokens` gets what each of them did with these.
fn forward_part(next: &Next, device: usize, range: Range<usize>, whole: usize, tokens: &mut [Tokens]) -> Result<Vec<Vec<Output>>, Fault> {
    let part;
    let pack = if range.len() == next.drawn.picks.len() {
        next.pack.as_ref().map_err(|problem| Fault::Failed(problem.clone()))?
    } else {
        part = Pack::forest(&next.drawn.encodings[range.clone()], |tokens| next.drawn.models.first()?.prefix_key(tokens));
        &part
    };
    let outputs = forward_pack(&next.drawn.models, device, pack)?;
    if outputs.len() != range.len() {
        return Err(Fault::Failed(format!("expected {} outputs of the model, found {}", range.len(), outputs.len())));
    }
    for (model, tokens) in tokens.iter_mut().enumerate() {
        tokens.add(pack, whole, |sample| outputs[sample].get(model).map_or(0, |output| output.cached_tokens));
    }
    Ok(outputs)
}

/// All models over one pack: per sample, one output per model.
fn forward_pack(models: &[Arc<dyn RewardModel>], device: usize, pack: &Pack) -> Result<Vec<Vec<Output>>, ModelError> {
    let mut samples: Vec<Vec<Output>> = Vec::new();
    for (i, model) in models.iter().enumerate() {
        let _forward = tracing::debug_span!("forward", model = i).entered();
        let outputs = model.forward_on(device, pack)?;
        if i == 0 {
            samples = outputs.into_iter().map(|output| vec![output]).collect();
            continue;
        }
        if outputs.len() != samples.len() {
            return Err(ModelError::Failed(format!("expected {} outputs of model {i}, found {}", samples.len(), outputs.len())));
        }
        for (sample, output) in samples.iter_mut().zip(outputs) {
            sample.push(output);
        }
    }
    Ok(samples)
}

/// The words of a panic, where it has some.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
