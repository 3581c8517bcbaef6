//! A trainer's step: how many tokens of it are distinct, how long one card takes, and how many cards it takes. Pure.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::Architecture;
use crate::model::token_cost;

/// What is scored at once: some prompts, and for each so many completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    pub prompts: u64,
    /// Completions of a prompt.
    pub group: u64,
    /// Tokens of a prompt.
    pub prompt: u64,
    /// Tokens of a completion.
    pub completion: u64,
}

/// More than any step has of anything.
const MOST: u64 = 100_000_000;
const FIELDS: [&str; 4] = ["prompts", "group", "prompt", "completion"];

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut found = [None; 4];
        for part in text.split(',') {
            let (name, number) = part.split_once('=').ok_or_else(|| format!("expected FIELD=NUMBER, found `{part}`"))?;
            let (name, number) = (name.trim(), number.trim());
            let Some(field) = FIELDS.iter().position(|field| *field == name) else {
                return Err(format!("`{name}` is no field; expected {}", FIELDS.join(", ")));
            };
            let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            // A prompt may be empty, nothing else may be none.
            let least = u64::from(name != "prompt");
            let value = number.parse().ok().filter(|value| digits && (least..=MOST).contains(value));
            let value = value.ok_or_else(|| format!("{name}: expected a whole number from {least} to {MOST}, found `{number}`"))?;
            if found[field].replace(value).is_some() {
                return Err(format!("{name} stands there twice"));
            }
        }
        match found {
            [Some(prompts), Some(group), Some(prompt), Some(completion)] => Ok(Self { prompts, group, prompt, completion }),
            _ => {
                let missing = FIELDS.iter().zip(found).filter(|(_, found)| found.is_none()).map(|(name, _)| *name);
                Err(format!("lacks {}", missing.collect::<Vec<_>>().join(", ")))
            }
        }
    }
}

impl Workload {
    pub fn samples(&self) -> u128 {
        u128::from(self.prompts) * u128::from(self.group)
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> u128 {
        self.samples() * u128::from(self.prompt + self.completion)
    }

    /// Tokens that are computed where every prompt is computed once.
    pub fn distinct(&self) -> u128 {
        u128::from(self.prompts) * u128::from(self.prompt) + self.samples() * u128::from(self.completion)
    }

    /// What computing a prompt with its completions takes, in tokens that attend to nothing.
    fn group_cost(&self, architecture: &Architecture) -> f64 {
        let (prompt, whole) = (self.prompt as usize, (self.prompt + self.completion) as usize);
        // A model without causality shares nothing.
        if !architecture.causal {
            return self.group as f64 * token_cost(architecture, 0, whole) as f64;
        }
        token_cost(architecture, 0, prompt) as f64 + self.group as f64 * token_cost(architecture, prompt, whole) as f64
    }
}

/// How fast one card is.
#[derive(Clone, Debug, PartialEq)]
pub enum Rate {
    /// So many distinct tokens a second, of samples like these.
    Told(f64),
    /// Groups like these, so many a second, by a measurement; samples of other lengths are counted by their attention, too.
    Measured { groups_per_second: f64, of: Workload, source: String },
}

impl Rate {
    /// What `warm bench --json` says of a load of random tokens in groups.
    pub fn of_bench(report: &Value, source: &str) -> Result<Self, String> {
        let wrong = |field: &str, problem: &str| format!("{source}: {field}: {problem}");
        let load = report.get("workload").filter(|load| load.is_object());
        let load = load.ok_or_else(|| {
            wrong(
                "workload",
                "expected the groups that were sent; the report of `warm bench --json` has them unless it read --input or sent --singles",
            )
        })?;
        let number = |from: &Value, field: &str, place: &str| {
            let found = from.get(field).and_then(Value::as_f64).filter(|number| number.is_finite() && *number > 0.0);
            found.ok_or_else(|| wrong(place, "expected a number above 0"))
        };
        let whole = |field: &str| Ok::<u64, String>(number(load, field, &format!("workload.{field}"))?.round().min(MOST as f64) as u64);
        let of = Workload { prompts: 1, group: whole("group")?, prompt: whole("prompt_tokens")?, completion: whole("completion_tokens")? };
        let none = Value::Null;
        let requests = number(report.get("per_second").unwrap_or(&none), "requests", "per_second.requests")?;
        Ok(Self::Measured { groups_per_second: requests, of, source: source.to_owned() })
    }

    /// Seconds that one card takes for a step.
    fn seconds(&self, workload: &Workload, architecture: &Architecture) -> f64 {
        match self {
            Self::Told(rate) if architecture.causal => workload.distinct() as f64 / rate,
            Self::Told(rate) => workload.tokens() as f64 / rate,
            Self::Measured { groups_per_second, of, .. } => {
                let cost = workload.group_cost(architecture) / of.group_cost(architecture).max(1.0);
                workload.prompts as f64 * cost / groups_per_second
            }
        }
    }
}

/// What a step comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepPlan {
    pub workload: Workload,
    pub samples: u128,
    pub tokens: u128,
    /// Tokens that are computed.
    pub distinct_tokens: u128,
    /// Where the rate comes from, in words; absent without one.
    pub rate: Option<String>,
    /// Of one card.
    pub seconds: Option<f64>,
    pub step_seconds: Option<f64>,
    /// Cards that score a step in that time.
    pub cards: Option<u64>,
    /// Distinct tokens of a second that all cards together need for that.
    pub needed_per_second: Option<f64>,
    /// What the model cannot do.
    pub problems: Vec<String>,
}

impl StepPlan {
    /// `step_seconds` is how long a step may take.
    pub fn new(workload: Workload, architecture: &Architecture, rate: Option<&Rate>, step_seconds: Option<f64>) -> Self {
        let seconds = rate.map(|rate| rate.seconds(&workload, architecture));
        let distinct = if architecture.causal { workload.distinct() } else { workload.tokens() };
        let longest = workload.prompt + workload.completion;
        let mut problems = Vec::new();
        if let Some(most) = architecture.longest().filter(|most| longest > *most as u64) {
            problems.push(format!("workload: samples of {longest} tokens are longer than the {most} that the model has positions for"));
        }
        Self {
            workload,
            samples: workload.samples(),
            tokens: workload.tokens(),
            distinct_tokens: distinct,
            rate: rate.map(|rate| match rate {
                Rate::Told(rate) => format!("{rate} distinct tokens a second, as told"),
                Rate::Measured { groups_per_second, of, source } => format!(
                    "{groups_per_second:.3} groups a second of {} x {} tokens behind {}, measured ({source})",
                    of.group, of.completion, of.prompt
                ),
            }),
            seconds,
            step_seconds,
            cards: seconds.zip(step_seconds).map(|(seconds, within)| (seconds / within).ceil().max(1.0) as u64),
            needed_per_second: step_seconds.map(|within| distinct as f64 / within),
            problems,
        }
    }
}

impl fmt::Display for StepPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Workload { prompts, group, prompt, completion } = self.workload;
        let (samples, tokens, distinct) = (self.samples, self.tokens, self.distinct_tokens);
        writeln!(f, "step: {prompts} prompts of {prompt} tokens with {group} completions of {completion} each")?;
        write!(f, "  {samples} samples of {tokens} tokens, {distinct} of them distinct")?;
        if distinct < tokens {
            write!(f, ": a prompt is computed once")?;
        }
        if let (Some(rate), Some(seconds)) = (&self.rate, self.seconds) {
            write!(f, "\n  {seconds:.1} s on one card, by {rate}")?;
        }
        match (self.step_seconds, self.cards, self.needed_per_second) {
            (Some(within), Some(1), _) => write!(f, "\n  within {within} s: 1 card")?,
            (Some(within), Some(cards), _) => write!(f, "\n  within {within} s: {cards} cards")?,
            (Some(within), None, Some(needed)) => write!(f, "\n  within {within} s: {needed:.0} distinct tokens a second")?,
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "workload_tests.rs"]
mod tests;
