//! What the demo prints.

use std::fmt;
use std::time::Duration;

use super::demo::DemoPrompt;
use crate::wire;

/// One prompt: a row per completion, with what every member, the ensemble and WARM say of it.
pub(super) struct PromptTable<'a> {
    pub prompt: &'a DemoPrompt,
    pub members: &'a [String],
    pub group: &'a wire::GroupComparison,
}

const NAME_WIDTH: usize = 7;
const EXCERPT_CHARS: usize = 48;

impl fmt::Display for PromptTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "prompt: {}", excerpt(&self.prompt.prompt, 100))?;
        write!(f, "   ")?;
        for member in self.members {
            write!(f, " {:>NAME_WIDTH$}", excerpt(member, NAME_WIDTH))?;
        }
        writeln!(f, " | {:>7} {:>6} | {:>7} | {:<8} | completion", "ENS", "std", "WARM", "chosen")?;
        let rows = self.group.completions.iter().zip(&self.prompt.completions).enumerate();
        for (i, (comparison, completion)) in rows {
            let place = u32::try_from(i).ok();
            let by_ens = place.is_some() && self.group.best_by_mean == place;
            let by_warm = place.is_some() && self.group.best_by_merged == place;
            let chosen = match (by_ens, by_warm) {
                (true, true) => "ENS WARM",
                (true, false) => "ENS",
                (false, true) => "WARM",
                (false, false) => "",
            };
            write!(f, "{i:>2} ")?;
            let Some(reward) = comparison.merged.as_ref().and_then(|merged| merged.reward) else {
                let failure = comparison.merged.as_ref().and_then(|merged| merged.failure.as_ref());
                writeln!(f, " not scored: {}", failure.map_or("no reason given", |failure| &failure.message))?;
                continue;
            };
            for member in &comparison.member_rewards {
                write!(f, " {member:>NAME_WIDTH$.3}")?;
            }
            let (mean, std) = (comparison.mean.unwrap_or_default(), comparison.std.unwrap_or_default());
            writeln!(f, " | {mean:>7.3} {std:>6.3} | {reward:>7.3} | {chosen:<8} | {}", excerpt(completion, EXCERPT_CHARS))?;
        }
        Ok(())
    }
}

/// The beginning of a text, on one line.
fn excerpt(text: &str, chars: usize) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.chars().count() <= chars { line } else { line.chars().take(chars.saturating_sub(1)).chain(['…']).collect() }
}

/// What one score costs one way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    forwards: usize,
    ms_per_score: f64,
    megabytes: f64,
    tokens_per_second: f64,
}

impl Cost {
    /// From a batch that took so long and gave so many scores of so many tokens, by models of so many bytes.
    pub(super) fn new(forwards: usize, (took, scores, tokens): (Duration, usize, u64), bytes: u64) -> Self {
        let seconds = took.as_secs_f64();
        Self {
            forwards,
            ms_per_score: seconds * 1e3 / scores.max(1) as f64,
            megabytes: bytes as f64 / 1e6,
            tokens_per_second: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
        }
    }
}

/// The paper's claim, measured here: one model in place of M.
pub(super) struct Efficiency {
    pub warm: Cost,
    pub ensemble: Cost,
}

impl fmt::Display for Efficiency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, cost) in [("WARM", self.warm), ("ensemble", self.ensemble)] {
            let forwards = if cost.forwards == 1 { "forward " } else { "forwards" };
            writeln!(
                f,
                "{name:<8}  {:>2} {forwards} per score  {:>8.2} ms per score  {:>7.1} MB of weights  {:>8.0} tokens/s",
                cost.forwards, cost.ms_per_score, cost.megabytes, cost.tokens_per_second
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_aligned_and_failures_keep_their_place() {
        let compared = |reward: f32| wire::Comparison {
            merged: Some(wire::Score { reward: Some(reward), ..Default::default() }),
            member_rewards: vec![reward, -10.5],
            mean: Some(reward),
            std: Some(0.5),
            ..Default::default()
        };
        let failure = wire::Failure { message: "too long".into(), ..Default::default() };
        let failed = wire::Comparison { merged: Some(wire::Score { failure: Some(failure), ..Default::default() }), ..Default::default() };
        let group = wire::GroupComparison {
            completions: vec![compared(1.0), failed, compared(-2.25)],
            best_by_merged: Some(0),
            best_by_mean: Some(2),
            ..Default::default()
        };
        let prompt = DemoPrompt { prompt: "p\nq".into(), completions: vec!["a\nb".into(), "b".into(), "é".repeat(80)] };
        let members = ["rm-0".to_owned(), "rm-1".to_owned()];
        let text = PromptTable { prompt: &prompt, members: &members, group: &group }.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "prompt: p q");
        let bar = |line: &str| line.char_indices().filter(|(_, c)| *c == '|').map(|(i, _)| i).collect::<Vec<_>>();
        assert_eq!(bar(lines[1]), bar(lines[2]), "{text}");
        assert!(lines[2].contains("| WARM     | a b"), "{text}");
        assert!(lines[3].contains("not scored: too long"), "{text}");
        assert!(lines[4].contains("| ENS      | "), "{text}");
    }

    #[test]
    fn costs_are_per_score() {
        let cost = Cost::new(5, (Duration::from_millis(200), 4, 1000), 3_000_000);
        assert_eq!((cost.ms_per_score, cost.megabytes, cost.tokens_per_second), (50.0, 3.0, 5000.0));
    }
}
