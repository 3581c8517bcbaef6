//! A pack through the models of its lane on one device, in parts where there is no room for the whole.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::budget::in_parts;
use super::{Pick, ScorerMetrics};
use crate::model::{ModelError, Output, Pack, RewardModel};
use crate::text::Encoding;

/// A pack to run, and whose samples it holds.
pub struct Next {
    pub picks: Vec<Pick>,
    pub models: Arc<[Arc<dyn RewardModel>]>,
    pub encodings: Vec<Arc<Encoding>>,
    /// `Err`: why it could not be made.
    pub pack: Result<Pack, String>,
    pub span: tracing::Span,
}

impl Next {
    pub fn new(picks: Vec<Pick>, models: Arc<[Arc<dyn RewardModel>]>, encodings: Vec<Arc<Encoding>>, span: tracing::Span) -> Self {
        // The models of a lane are of one architecture, so what may be shared is the same for all of them.
        let make = || Pack::forest(&encodings, |tokens| models.first()?.prefix_key(tokens));
        let pack = catch_unwind(AssertUnwindSafe(make)).map_err(|panic| format!("packing panicked: {}", panic_message(panic.as_ref())));
        Self { picks, models, encodings, pack, span }
    }

    /// Lets the first model make ready on a device what it needs there, while another pack is computed. What goes wrong here
    /// goes wrong again when the pack is run.
    pub fn prepare(&self, device: usize) {
        if let (Ok(pack), Some(model)) = (&self.pack, self.models.first()) {
            let _ = catch_unwind(AssertUnwindSafe(|| model.prepare(device, pack)));
        }
    }
}

/// What a pack gave.
pub struct Forwarded {
    /// Per sample, one output per model; `Err` where the device has no room for it alone.
    pub outcomes: Vec<Result<Vec<Output>, String>>,
    /// Tokens of the largest part that was run at once.
    pub largest: usize,
    /// Parts that did not fit.
    pub misfits: usize,
}

/// Why a pack as a whole gave nothing.
pub struct Trouble {
    pub words: String,
    pub device_lost: bool,
}

impl Trouble {
    pub fn of_pack(words: String) -> Self {
        Self { words, device_lost: false }
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

/// All models over one pack, or over parts of it where the device has no room for the whole.
pub fn forward(next: &Next, device: usize, metrics: &ScorerMetrics) -> Result<Forwarded, Trouble> {
    let sizes: Vec<usize> = next.picks.iter().map(|pick| pick.tokens).collect();
    let run = || -> Result<(Forwarded, Vec<Tokens>), Trouble> {
        let whole = next.pack.as_ref().map_err(|problem| Trouble::of_pack(problem.clone()))?;
        let mut tokens = vec![Tokens::default(); next.models.len()];
        let parts = in_parts(&sizes, |range| {
            let part;
            let pack = if range.len() == sizes.len() {
                whole
            } else {
                part = Pack::forest(&next.encodings[range.clone()], |tokens| next.models.first()?.prefix_key(tokens));
                &part
            };
            let outputs = forward_pack(&next.models, device, pack).map_err(|error| match error {
                ModelError::OutOfMemory(_) => Ok(error.to_string()),
                ModelError::DeviceLost(_) => Err(Trouble { words: error.to_string(), device_lost: true }),
                ModelError::Failed(_) => Err(Trouble::of_pack(error.to_string())),
            })?;
            if outputs.len() != range.len() {
                return Err(Err(Trouble::of_pack(format!("expected {} outputs of the model, found {}", range.len(), outputs.len()))));
            }
            let whole: usize = sizes[range].iter().sum();
            for (model, tokens) in tokens.iter_mut().enumerate() {
                tokens.add(pack, whole, |sample| outputs[sample].get(model).map_or(0, |output| output.cached_tokens));
            }
            Ok(outputs)
        })?;
        Ok((Forwarded { outcomes: parts.outcomes, largest: parts.largest, misfits: parts.misfits }, tokens))
    };
    let caught = catch_unwind(AssertUnwindSafe(run));
    let tokens = sizes.iter().sum::<usize>();
    metrics.pack_samples.observe(next.picks.len() as f64);
    let outcome = match &caught {
        Ok(Ok((forwarded, tokens))) => {
            metrics.pack_tokens.observe(tokens.first().map_or(0, |tokens| tokens.computed) as f64);
            metrics.samples.inc_by(forwarded.outcomes.iter().filter(|outcome| outcome.is_ok()).count() as u64);
            for Tokens { computed, shared, cached } in tokens {
                metrics.tokens_computed.inc_by(*computed as u64);
                metrics.tokens_shared.inc_by(*shared as u64);
                metrics.tokens_cached.inc_by(*cached as u64);
            }
            if forwarded.misfits == 0 { "ok" } else { "split" }
        }
        Ok(Err(_)) => "error",
        Err(_) => "panic",
    };
    metrics.packs.with_label_values(&[outcome]).inc();
    let result = caught.unwrap_or_else(|panic| {
        let words = panic_message(panic.as_ref());
        Err(Trouble::of_pack(format!("the forward pass panicked: {words}")))
    });
    if let Err(Trouble { words, device_lost }) = &result {
        tracing::error!(problem = words, samples = next.picks.len(), tokens, device, device_lost, "a pack failed");
    }
    result.map(|(forwarded, _)| forwarded)
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
