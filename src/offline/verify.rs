//! A model against reference scores: the same tokens, the same place, the same number.

use std::fmt;

use super::golden::{Case, Expected, Golden, UNNAMED};
use super::score::{OfflineError, Scorer};
use crate::client::sample_to_wire;
use crate::domain::{FailureKind, Sample, kendall_tau_b};
use crate::registry::CallOptions;
use crate::scorer::Permit;
use crate::wire;

/// Samples of one request.
const CHUNK: usize = 256;
/// Differences that are told one by one.
const TOLD: usize = 10;

/// Who is asked, and what counts as the same.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyOptions {
    /// A member's name, or `None` for the merged model.
    pub scorer: Option<String>,
    /// The name of its scores in the file.
    pub key: String,
    /// The largest deviation, as a part of the score where that is above 1.
    pub tolerance: f64,
}

/// What came of one comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified {
    pub name: String,
    pub cases: usize,
    /// Cases whose tokens are known and equal, of those that are known.
    pub ids: (usize, usize),
    pub positions: (usize, usize),
    /// Cases with a score within the tolerance, and refusals that are refused.
    pub within: usize,
    pub largest_deviation: f64,
    /// The case it is in.
    pub worst: Option<usize>,
    /// Kendall's tau-b; `None` where it is undefined.
    pub rank_agreement: Option<f64>,
    /// The first few differences, as sentences.
    pub differences: Vec<String>,
}

impl Verified {
    pub fn passed(&self) -> bool {
        self.within == self.cases && self.ids.0 == self.ids.1 && self.positions.0 == self.positions.1
    }
}

/// The name of the merged model's scores: the only one there is, that of the only folder, `warm`, or the unnamed ones.
pub fn key_of(golden: &Golden, asked: Option<&str>, folders: &[String]) -> Result<String, String> {
    let names = golden.names();
    let known = |name: &str| names.contains(&name).then(|| name.to_owned());
    if let Some(asked) = asked {
        return known(asked).ok_or_else(|| format!("the file has no scores of {asked:?} for every case, only of {}", names.join(", ")));
    }
    let folder = match folders {
        [only] => known(only),
        _ => None,
    };
    let only = || if let [only] = names.as_slice() { Some((*only).to_owned()) } else { None };
    let found = folder.or_else(only).or_else(|| known("warm")).or_else(|| known(UNNAMED));
    found.ok_or_else(|| format!("the file has scores of {}; say which with --key", names.join(", ")))
}

/// What a scorer says of one case.
struct Found {
    ids: Vec<u32>,
    position: usize,
    reward: f64,
    outputs: Vec<f64>,
}

/// Scores all cases and compares.
pub async fn verify(golden: &Golden, scorer: &Scorer, options: &VerifyOptions) -> Result<Verified, OfflineError> {
    let name = options.scorer.clone().unwrap_or_else(|| options.key.clone());
    let mut tally = Tally {
        verified: Verified {
            name,
            cases: golden.cases.len(),
            ids: (0, 0),
            positions: (0, 0),
            within: 0,
            largest_deviation: 0.0,
            worst: None,
            rank_agreement: None,
            differences: Vec::new(),
        },
        pairs: Vec::new(),
    };
    for (chunk, cases) in golden.cases.chunks(CHUNK).enumerate() {
        let samples = cases.iter().map(|case| case.sample.clone()).collect();
        let found = ask(scorer, samples, options.scorer.as_deref()).await?;
        for (offset, (case, found)) in cases.iter().zip(found).enumerate() {
            tally.add(chunk * CHUNK + offset, case, found, options);
        }
    }
    let (ours, theirs): (Vec<f64>, Vec<f64>) = tally.pairs.into_iter().unzip();
    Ok(Verified { rank_agreement: kendall_tau_b(&ours, &theirs), ..tally.verified })
}

async fn ask(scorer: &Scorer, samples: Vec<Sample>, name: Option<&str>) -> Result<Vec<Result<Found, (String, String)>>, OfflineError> {
    let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect();
    match scorer {
        Scorer::Engine(engine) => {
            let call = CallOptions { details: true, scorer: name.map(str::to_owned), ..CallOptions::default() };
            let reply = engine.score(samples, call, Permit::unlimited()).await?;
            let found = reply.outcomes.into_iter().map(|outcome| {
                let scored = outcome.map_err(|failure| (failure.kind.name().to_owned(), failure.message))?;
                let details = scored.details.unwrap_or_default();
                let (reward, outputs) = (f64::from(scored.reward.get()), wide(&scored.outputs));
                Ok(Found { ids: details.token_ids, position: details.pooled_position, reward, outputs })
            });
            Ok(found.collect())
        }
        Scorer::Remote(client) => {
            let options = wire::ScoreOptions { details: true, scorer: name.unwrap_or_default().to_owned(), ..Default::default() };
            let samples = samples.iter().map(sample_to_wire).collect();
            let response = client.score(wire::ScoreRequest { samples, options: Some(options), ..Default::default() }).await?;
            let found = response.scores.into_iter().map(|score| {
                if let Some(failure) = score.failure {
                    return Err((failure.kind().as_str_name().to_ascii_lowercase(), failure.message));
                }
                let details = score.details.unwrap_or_default();
                let (reward, outputs) = (f64::from(score.reward.unwrap_or(f32::NAN)), wide(&score.outputs));
                Ok(Found { ids: details.token_ids, position: details.pooled_position as usize, reward, outputs })
            });
            Ok(found.collect())
        }
    }
}

struct Tally {
    verified: Verified,
    /// Found and expected reward of every case that has both.
    pairs: Vec<(f64, f64)>,
}

impl Tally {
    fn add(&mut self, index: usize, case: &Case, found: Result<Found, (String, String)>, options: &VerifyOptions) {
        let (found, expected) = match (found, &case.expected) {
            (Ok(found), Expected::Scores(scores)) => match scores.get(&options.key) {
                Some(expected) => (found, expected),
                None => return self.differ(index, format!("the file has no score of {:?}", options.key)),
            },
            (Err((kind, _)), Expected::Refused) if kind == FailureKind::TemplateRefused.name() => {
                self.verified.within += 1;
                return;
            }
            (Err((kind, message)), _) => return self.differ(index, format!("cannot be scored: {kind}: {message}")),
            (Ok(found), Expected::Refused) => return self.differ(index, format!("is refused there and scored {} here", found.reward)),
        };
        if let Some(ids) = &case.ids {
            self.verified.ids.1 += 1;
            if *ids == found.ids {
                self.verified.ids.0 += 1;
            } else {
                let at = ids.iter().zip(&found.ids).take_while(|(expected, found)| expected == found).count();
                let (expected, found) = (ids.get(at), found.ids.get(at));
                let words = |id: Option<&u32>| id.map_or("the end".to_owned(), u32::to_string);
                self.differ(index, format!("token {at}: expected {}, found {}", words(expected), words(found)));
            }
        }
        if let Some(position) = case.position {
            self.verified.positions.1 += 1;
            if position == found.position {
                self.verified.positions.0 += 1;
            } else {
                self.differ(index, format!("the head reads token {}, expected {position}", found.position));
            }
        }
        let values = if expected.len() > 1 { found.outputs.as_slice() } else { std::slice::from_ref(&found.reward) };
        if values.len() != expected.len() {
            return self.differ(index, format!("expected {} outputs, found {}", expected.len(), values.len()));
        }
        let deviation = values.iter().zip(expected).map(|(found, expected)| (found - expected).abs() / expected.abs().max(1.0));
        // A NaN is no score within anything.
        let deviation = deviation.fold(0.0, |most, deviation| if deviation <= most { most } else { deviation });
        if self.verified.worst.is_none() || deviation > self.verified.largest_deviation || deviation.is_nan() {
            (self.verified.largest_deviation, self.verified.worst) = (deviation, Some(index));
        }
        if deviation <= options.tolerance {
            self.verified.within += 1;
        } else {
            self.differ(index, format!("expected {expected:?}, found {values:?}: a deviation of {deviation:.2e}"));
        }
        self.pairs.push((values[0], expected[0]));
    }

    fn differ(&mut self, index: usize, sentence: String) {
        if self.verified.differences.len() < TOLD {
            self.verified.differences.push(format!("case {index}: {sentence}"));
        }
    }
}

/// A table with a line for each comparison, and the first differences of each.
pub struct Table<'a>(pub &'a [Verified]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|row| row.name.len()).max().unwrap_or(0).max(5);
        writeln!(f, "{:width$}  cases    ids  places  within  largest deviation  rank agreement", "")?;
        for row in self.0 {
            let of = |(equal, known): (usize, usize)| if known == 0 { "-".to_owned() } else { format!("{equal}/{known}") };
            let worst = row.worst.map_or(String::new(), |worst| format!("(case {worst})"));
            let (ids, places) = (of(row.ids), of(row.positions));
            let tau = row.rank_agreement.map_or("-".to_owned(), |tau| format!("{tau:.6}"));
            writeln!(
                f,
                "{:width$}  {:>5}  {ids:>7}  {places:>6}  {:>6}  {:.2e} {worst:<9}  {tau}",
                row.name, row.cases, row.within, row.largest_deviation
            )?;
        }
        for row in self.0 {
            for difference in &row.differences {
                writeln!(f, "{}: {difference}", row.name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
