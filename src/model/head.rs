//! The reward head: pooled hidden states to raw outputs, in float32, each output by one dot product in a fixed order.

use super::LoadError;
use super::kernels::{activation, linear};
use super::weights::Loader;
use crate::checkpoint::{Activation, Layout};

/// Linear layers, each with the activation that follows it; the last one has none, because a reward is a raw logit.
#[derive(Debug)]
pub struct Head {
    stages: Vec<Stage>,
}

#[derive(Debug)]
struct Stage {
    /// `[outputs, inputs]`.
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    activation: Option<Activation>,
}

impl Head {
    pub fn load(layout: &Layout, loader: &mut Loader) -> Result<Self, LoadError> {
        let stages = layout.head.iter().map(|stage| {
            let bias = stage.linear.bias.as_deref().map(|bias| loader.host(bias)).transpose()?;
            Ok(Stage { weight: loader.host(&stage.linear.weight)?, bias, activation: stage.activation })
        });
        Ok(Self { stages: stages.collect::<Result<_, LoadError>>()? })
    }

    /// Hidden state of one sample to its outputs.
    pub fn forward(&self, hidden: &[f32]) -> Vec<f32> {
        self.stages.iter().fold(hidden.to_vec(), |x, stage| {
            let mut y = linear::project(&x, &stage.weight, stage.bias.as_deref());
            if let Some(kind) = stage.activation {
                let width = y.len();
                activation::activate(kind, &mut y, width);
            }
            y
        })
    }
}
