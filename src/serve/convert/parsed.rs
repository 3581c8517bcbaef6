//! What a checked request is made of.

use crate::domain::{MemberName, MemberScale, Sample, Truncation};

/// Bounds of one request, beside the size of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertLimits {
    /// Samples, with the completions of groups and both sides of pairs counted.
    pub max_samples: usize,
    /// Bytes after groups are expanded: each completion stands with its whole prompt, so a small message can become large.
    pub max_expanded_bytes: usize,
}

/// No text has more bytes in a token, on the average.
const MOST_BYTES_PER_TOKEN: usize = 32;

impl ConvertLimits {
    /// Nothing is expanded that could not be let in afterwards, whose tokens in flight are bounded by `max_tokens`.
    pub fn new(max_samples: usize, max_expanded: usize, max_tokens: usize) -> Self {
        Self { max_samples, max_expanded_bytes: max_expanded.min(max_tokens.saturating_mul(MOST_BYTES_PER_TOKEN)) }
    }
}

impl Default for ConvertLimits {
    fn default() -> Self {
        Self { max_samples: 65_536, max_expanded_bytes: 1 << 30 }
    }
}

/// The options of a request, in the domain's words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    pub truncation: Truncation,
    pub calibrated: bool,
    pub fingerprint: Option<String>,
    pub details: bool,
    pub priority: i32,
    pub strict: bool,
    pub scorer: Option<MemberName>,
}

/// All that a request wants scored, flattened, with the shape to fold the answers back into.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Lone samples, then the completions of all groups, then chosen and rejected of all pairs.
    pub samples: Vec<Sample>,
    pub shape: Shape,
}

/// How the samples of a request belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Lone samples.
    pub singles: usize,
    /// Completions of each group.
    pub groups: Vec<usize>,
    /// Preferences of two samples each.
    pub pairs: usize,
}

/// One answer per sample, folded into the shape of the request.
#[derive(Clone, Debug, PartialEq)]
pub struct Folded<T> {
    pub singles: Vec<T>,
    pub groups: Vec<Vec<T>>,
    pub pairs: Vec<(T, T)>,
}

impl Shape {
    /// Folds one value per sample, in order, into the request's shape.
    pub fn fold<T>(&self, values: Vec<T>) -> Folded<T> {
        let mut values = values.into_iter();
        let singles = values.by_ref().take(self.singles).collect();
        let groups = self.groups.iter().map(|&size| values.by_ref().take(size).collect()).collect();
        let pairs = (0..self.pairs).filter_map(|_| Some((values.next()?, values.next()?))).collect();
        Folded { singles, groups, pairs }
    }
}

/// A checked `ScoreRequest`.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedScore {
    pub request_id: String,
    pub batch: Batch,
    pub asked: Asked,
}

/// A checked `CompareRequest`.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedCompare {
    pub request_id: String,
    pub batch: Batch,
    pub asked: Asked,
    /// Empty: all.
    pub members: Vec<MemberName>,
    pub uwo_lambda: Option<f32>,
    pub member_scale: MemberScale,
}
