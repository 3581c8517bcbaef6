//! How one sample is read: the rendered text, its tokens, what was decided on the way, and the token that the head reads.

use std::io::{self, Write};

use crate::domain::{Failure, Sample, Scored};
use crate::text::{ReasoningPolicy, TextPipeline};

/// Prints one sample, and its score where there is one. `scored` must hold details.
pub fn explain(
    out: &mut impl Write,
    text: &TextPipeline,
    sample: &Sample,
    truncation: crate::domain::Truncation,
    scored: Result<&Scored, &Failure>,
) -> io::Result<()> {
    let explanation = match text.explain(sample, truncation) {
        Ok(explanation) => explanation,
        Err(failure) => return writeln!(out, "cannot be scored: {}: {failure}", failure.kind.name()),
    };
    if let Some(rendered) = explanation.encoding.rendered() {
        writeln!(out, "rendered by the chat template:\n---\n{rendered}\n---")?;
    }
    let policy = text.policy();
    writeln!(out, "bos: {} (token {})", policy.bos.name(), policy.bos_token.as_deref().unwrap_or("none"))?;
    writeln!(out, "eos: {} (token {})", policy.eos.name(), policy.eos_token.as_deref().unwrap_or("none"))?;
    writeln!(out, "pad: {}", policy.pad_id.map_or("none".to_owned(), |id| id.to_string()))?;
    if policy.reasoning == ReasoningPolicy::Strip {
        writeln!(out, "reasoning: strip")?;
    }
    for note in &explanation.notes {
        writeln!(out, "note: {note}")?;
    }
    let pooled = scored.ok().and_then(|scored| scored.details.as_ref()).map(|details| details.pooled_position);
    let step = |i: usize| scored.ok().and_then(|scored| scored.steps.iter().find(|step| step.position == i));
    writeln!(out, "tokens: {}", explanation.encoding.tokens())?;
    let tokens = explanation.encoding.ids().iter().zip(&explanation.tokens).zip(&explanation.special);
    for (i, ((id, token), special)) in tokens.enumerate() {
        let kind = if *special { "  special" } else { "" };
        let read = match step(i) {
            Some(step) => format!("  <- a step: {}", step.reward.get()),
            None if pooled == Some(i) => "  <- the head reads this one".to_owned(),
            None => String::new(),
        };
        writeln!(out, "  {i:>5}  {id:>7}  {token:?}{kind}{read}")?;
    }
    match scored {
        Ok(scored) => writeln!(out, "reward: {}", scored.reward.get()),
        Err(failure) => writeln!(out, "cannot be scored: {}: {failure}", failure.kind.name()),
    }
}
