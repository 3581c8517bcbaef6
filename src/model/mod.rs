//! Tokens to rewards: packing, the forward pass, and the head. The only layer that knows candle.

/// A loaded reward model on one device. Immutable, so it may be shared by any number of jobs; `forward` is called by the
/// device worker alone, inside the worker's own rayon pool.
pub trait RewardModel: Send + Sync {
    /// Scores every sample of a pack.
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError>;

    /// What the queue may put into one pack.
    fn limits(&self) -> Limits;
}

/// What the head says of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// One value per output of the head, in float32, raw (no activation); may be NaN, which the caller must turn into a
    /// failure of this sample.
    pub values: Vec<f32>,
    /// Index of the token that was pooled, within the sample.
    pub pooled_position: usize,
    /// Tokens of this sample that were computed for it and another sample at once.
    pub shared_tokens: usize,
}

/// Bounds of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest sample, in tokens.
    pub max_tokens: usize,
    /// Outputs of the head.
    pub outputs: usize,
    /// Parameters of the loaded model.
    pub parameters: u64,
    /// Bytes the weights take on the device.
    pub device_bytes: u64,
}

/// A forward pass that failed as a whole.
#[derive(Clone, Debug, thiserror::Error)]
#[error("forward failed: {0}")]
pub struct ModelError(pub String);

/// Encodings that are run in one forward pass. No padding exists in it.
#[derive(Clone, Debug)]
pub struct Pack {
    /// Placeholder: grows into the forest of token runs.
    pub samples: Vec<std::sync::Arc<crate::text::Encoding>>,
}

impl Pack {
    /// Packs samples end to end, in order; the outputs of a forward come back in the same order.
    pub fn new(samples: &[std::sync::Arc<crate::text::Encoding>]) -> Self {
        Self { samples: samples.to_vec() }
    }
}
