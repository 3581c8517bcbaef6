//! What comes back for a sample: a finite score, or the reason why there is none.

/// A raw reward: the head's logit, finite.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Score(f32);

/// A model's output that is NaN or infinite, which is never handed out as a score.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the model's output is {0}, not a finite number")]
pub struct NonFinite(pub f32);

impl TryFrom<f32> for Score {
    type Error = NonFinite;

    fn try_from(value: f32) -> Result<Self, NonFinite> {
        if value.is_finite() { Ok(Self(value)) } else { Err(NonFinite(value)) }
    }
}

impl Score {
    pub fn get(self) -> f32 {
        self.0
    }
}

/// A scored sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    pub reward: Score,
    /// Every output of the head, in its order, if there are several; otherwise empty.
    pub outputs: Vec<f32>,
    /// What a process reward model says of each step, in order; the reward is their reduction. Otherwise empty.
    pub steps: Vec<Step>,
    /// Tokens scored, after truncation.
    pub tokens: usize,
    pub truncated: bool,
    /// Present where the caller asked for it.
    pub details: Option<ScoreDetails>,
}

/// One step of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Index of the token that ends the step.
    pub position: usize,
    /// The step's own score.
    pub reward: Score,
    /// Every output of the head at this token, in its order, raw.
    pub outputs: Vec<f32>,
}

/// What anyone needs to check a score by hand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScoreDetails {
    pub token_ids: Vec<u32>,
    /// Index into `token_ids` of the token whose hidden state the head reads: of the last step, where there are steps; 0
    /// where it reads the mean of all.
    pub pooled_position: usize,
    /// Tokens of this sample that were there already: computed for it and another sample at once, or with an earlier pack.
    pub shared_tokens: usize,
    /// The text that the chat template gave; empty where the caller sent tokens.
    pub rendered: String,
}

/// Why one sample cannot be scored; the others of its request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// More tokens than the model takes, and truncation was not asked for (or would cut what the head reads).
    TooLong,
    /// The chat template refused the conversation.
    TemplateRefused,
    /// No token is left to score.
    Empty,
    /// The model's output is NaN or infinite.
    NonFinite,
    /// The deadline passed while the sample was queued.
    Expired,
    /// A thinking block that never closes, where the text policy strips them.
    UnfinishedReasoning,
    /// A token id that the model's embedding does not have.
    UnknownToken,
    /// The head reads at a token (of a step, of the prompt's end) that the sample does not have.
    NothingToRead,
}

impl FailureKind {
    /// The name used in JSON lines, logs and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::TemplateRefused => "template_refused",
            Self::Empty => "empty",
            Self::NonFinite => "non_finite",
            Self::Expired => "expired",
            Self::UnfinishedReasoning => "unfinished_reasoning",
            Self::UnknownToken => "unknown_token",
            Self::NothingToRead => "nothing_to_read",
        }
    }

    /// All kinds, for metrics that show every series before the first failure.
    pub const ALL: [Self; 8] = [
        Self::TooLong,
        Self::TemplateRefused,
        Self::Empty,
        Self::NonFinite,
        Self::Expired,
        Self::UnfinishedReasoning,
        Self::UnknownToken,
        Self::NothingToRead,
    ];
}

/// The failure of one sample, with a message for people.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

impl Failure {
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// What to do with a sample of more tokens than the model takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Truncation {
    /// It fails: nothing is ever cut silently.
    #[default]
    Refuse,
    /// Keep the end.
    Left,
    /// Keep the beginning.
    Right,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_finite() {
        assert_eq!(Score::try_from(-1.5).map(Score::get), Ok(-1.5));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Score::try_from(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_failure_kind_is_listed_once() {
        let names: std::collections::BTreeSet<_> = FailureKind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), FailureKind::ALL.len());
    }
}
