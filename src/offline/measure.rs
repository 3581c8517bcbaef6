//! How many groups of a workload this machine scores in a second.

use std::sync::Arc;

use super::workload::{Rate, Workload};
use crate::clock::Clock;
use crate::domain::{Sample, Truncation};
use crate::model::Pack;
use crate::registry::Generation;
use crate::text::Encoding;

/// Runs after the first, which warms up; their median counts.
const RUNS: usize = 3;

/// Scores groups like those of `workload`, as large as a pack holds, on the first device of a generation. Random tokens: what
/// they say does not matter for how long they take.
pub fn measure(generation: &Generation, workload: &Workload, max_pack_tokens: usize, clock: &Clock) -> Result<Rate, String> {
    let model = generation.model();
    let (prompt, completion) = (workload.prompt as usize, workload.completion as usize);
    let longest = model.limits().max_tokens;
    if prompt + completion > longest {
        return Err(format!("workload: samples of {} tokens are longer than max_tokens, which is {longest}", prompt + completion));
    }
    let group = (max_pack_tokens.saturating_sub(prompt) / completion).clamp(1, usize::try_from(workload.group).unwrap_or(usize::MAX));
    let vocabulary = generation.info.vocabulary.max(1);
    let ids = |count: usize, seed: usize| (0..count).map(move |place| ((place * 7919 + seed * 104_729 + 11) % vocabulary) as u32);
    let encode = |sample: usize| -> Result<Arc<Encoding>, String> {
        let ids = ids(prompt, 0).chain(ids(completion, sample + 1)).collect();
        generation.text.encode(&Sample::Tokens(ids), Truncation::Refuse).map(Arc::new).map_err(|failure| failure.to_string())
    };
    let samples = (0..group).map(encode).collect::<Result<Vec<_>, _>>()?;
    let pack = Pack::forest(&samples, |tokens| model.prefix_key(tokens));
    // What was scored before would be there already.
    model.keep_prefixes(0);
    let mut seconds = Vec::with_capacity(RUNS);
    for run in 0..=RUNS {
        let started = clock.now();
        model.forward(&pack).map_err(|error| error.to_string())?;
        if run > 0 {
            seconds.push(clock.now().saturating_duration_since(started).as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    // A clock that stands still measures nothing, which is no reason to divide by it.
    let took = seconds[seconds.len() / 2].max(1e-9);
    let of = Workload { prompts: 1, group: group as u64, ..*workload };
    Ok(Rate::Measured { groups_per_second: 1.0 / took, of, source: format!("here, on {}", model.runs_on().join(", ")) })
}
