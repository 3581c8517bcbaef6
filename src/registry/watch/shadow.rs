//! The shadow ensemble: a share of live prompts, scored by the members while nobody else wants the device.
//!
//! An answer never waits in a queue behind it. One member runs over one small piece at a time, and only when the device has
//! nothing to do; so whoever comes meanwhile waits for the rest of that one forward. What finds no quiet moment is dropped
//! and counted.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;

use super::super::members::Scales;
use super::super::outcomes::{first, reward};
use super::super::{CallOptions, Engine};
use super::{Judged, Shadowed, Watch, Watched};
use crate::domain::{FailureKind, MemberName, MemberScale, Score};
use crate::lock::lock;
use crate::registry::Generation;
use crate::scorer::{PRIORITIES, Permit};
use crate::text::Encoding;

/// Prompts that wait for a quiet moment, at most.
pub(super) const MAILBOX: usize = 32;
/// Tokens of one piece, but for a single sample that is longer.
pub(super) const PIECE_TOKENS: usize = 2048;
/// How often a busy device is looked at again, and how many times.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const LOOKS: usize = 100;

/// What became of samples that were drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowOutcome {
    /// The members' rewards are among the figures.
    Scored,
    /// Where each model's rewards lie is not known yet; these samples help to learn it.
    Uncentered,
    /// The tokens of this second were spent.
    Budget,
    /// The device found no quiet moment.
    Busy,
    /// No member stands on the device.
    NoMembers,
    /// The generation was retired before its members were asked.
    Gone,
    /// A member gave no finite reward.
    Failed,
}

impl ShadowOutcome {
    pub const ALL: [Self; 7] = [Self::Scored, Self::Uncentered, Self::Budget, Self::Busy, Self::NoMembers, Self::Gone, Self::Failed];

    /// The name used in metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scored => "scored",
            Self::Uncentered => "uncentered",
            Self::Budget => "budget",
            Self::Busy => "busy",
            Self::NoMembers => "no_members",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

/// One prompt's samples that the members are to score.
pub(super) struct Drawn {
    tenant: Arc<str>,
    /// Waiting for a quiet moment must not keep a generation that retires.
    generation: Weak<Generation>,
    samples: Vec<Judged>,
}

impl Watch {
    /// Draws prompts of one call.
    pub(super) fn draw(&self, watched: &Watched, generation: &Arc<Generation>, samples: &[Result<Judged, FailureKind>]) {
        let members = generation.resident().count();
        let mut begin = 0;
        for &size in &watched.prompts {
            let prompt = samples.get(begin..begin + size).unwrap_or_default();
            begin += size;
            let samples: Vec<Judged> = prompt.iter().flatten().cloned().collect();
            let count = samples.len();
            if count == 0 || !lock(&self.0.draw).0.next() {
                continue;
            }
            if members == 0 {
                self.count(ShadowOutcome::NoMembers, count);
                continue;
            }
            let tokens: usize = samples.iter().map(|sample| sample.encoding.tokens()).sum();
            if !lock(&self.0.draw).1.take((tokens * members) as f64, self.0.clock.now()) {
                self.count(ShadowOutcome::Budget, count);
                continue;
            }
            let drawn = Drawn { tenant: watched.tenant.clone(), generation: Arc::downgrade(generation), samples };
            if let Err(TrySendError::Full(_) | TrySendError::Closed(_)) = self.0.mailbox.try_send(drawn) {
                self.count(ShadowOutcome::Busy, count);
            }
        }
    }

    /// Lets the members score what was drawn. Runs until it is dropped; only the first call does anything.
    pub async fn shadow(self, engine: Engine) {
        let Some(mut inbox) = lock(&self.0.inbox).take() else { return };
        while let Some(drawn) = inbox.recv().await {
            let count = drawn.samples.len();
            let outcome = self.score(&engine, drawn).await.unwrap_or_else(|outcome| outcome);
            self.count(outcome, count);
        }
    }

    async fn score(&self, engine: &Engine, drawn: Drawn) -> Result<ShadowOutcome, ShadowOutcome> {
        let generation = drawn.generation.upgrade().ok_or(ShadowOutcome::Gone)?;
        let names: Vec<MemberName> = generation.resident().cloned().collect();
        let mut rewards: Vec<Vec<Score>> = vec![Vec::with_capacity(names.len()); drawn.samples.len()];
        for name in &names {
            let found = members_rewards(engine, &generation, name, &drawn.samples).await?;
            rewards.iter_mut().zip(found).for_each(|(row, reward)| row.push(reward));
        }
        for (sample, members) in drawn.samples.iter().zip(&rewards) {
            generation.running.push(sample.reward, names.iter().zip(members.iter().copied()));
        }
        let scales = Scales::new(&generation, &names, MemberScale::Centered).map_err(|_| ShadowOutcome::Uncentered)?;
        let centered = |(sample, members): (&Judged, &Vec<Score>)| {
            let number = |score: Score| f64::from(score.get());
            let members = members.iter().enumerate().map(|(place, &raw)| scales.member(place, raw).map(number));
            Ok((number(scales.merged(sample.reward)?), members.collect::<Result<Vec<f64>, _>>()?))
        };
        let samples: Result<Vec<_>, crate::domain::NonFinite> = drawn.samples.iter().zip(&rewards).map(centered).collect();
        let shadowed = Shadowed { samples: samples.map_err(|_| ShadowOutcome::Failed)? };
        self.shadowed(&drawn.tenant, &generation, &shadowed);
        Ok(ShadowOutcome::Scored)
    }
}

/// The raw rewards of one member, piece by piece, each in a quiet moment.
async fn members_rewards(
    engine: &Engine,
    generation: &Generation,
    name: &MemberName,
    samples: &[Judged],
) -> Result<Vec<Score>, ShadowOutcome> {
    let lane = super::super::outcomes::resident(generation, name).ok_or(ShadowOutcome::NoMembers)?;
    let options = CallOptions { priority: *PRIORITIES.start(), tenant: Some("warm shadow".into()), ..CallOptions::default() };
    let mut rewards = Vec::with_capacity(samples.len());
    for piece in pieces(samples) {
        quiet(engine).await?;
        let encodings: Vec<Arc<Encoding>> = piece.iter().map(|sample| sample.encoding.clone()).collect();
        let reply = engine.submit(lane.clone(), encodings, &options, Permit::unlimited()).await.map_err(|_| ShadowOutcome::Busy)?;
        for outcome in reply.outcomes {
            let outputs = outcome.map_err(|_| ShadowOutcome::Busy)?;
            rewards.push(first(&outputs).and_then(reward).map_err(|_| ShadowOutcome::Failed)?);
        }
    }
    if rewards.len() == samples.len() { Ok(rewards) } else { Err(ShadowOutcome::Failed) }
}

/// Waits until the device has nothing to do, for a while.
async fn quiet(engine: &Engine) -> Result<(), ShadowOutcome> {
    let clock = engine.clock();
    for _ in 0..LOOKS {
        if engine.scorer().is_idle() {
            return Ok(());
        }
        clock.sleep_until(clock.now() + LOOK_AGAIN).await;
    }
    Err(ShadowOutcome::Busy)
}

/// Samples side by side, of few tokens together.
pub(super) fn pieces(samples: &[Judged]) -> impl Iterator<Item = &[Judged]> {
    let mut rest = samples;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = rest.iter().take_while(|sample| {
            tokens += sample.encoding.tokens();
            tokens <= PIECE_TOKENS
        });
        let (piece, more) = rest.split_at_checked(fits.count().max(1))?;
        rest = more;
        Some(piece)
    })
}
