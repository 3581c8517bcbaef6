//! A mixture of experts: a router gives every token a few MLPs, and their outputs are added by its weights.
//!
//! Every expert sees only the rows that chose it, gathered into one product. A row's result does not depend on which other
//! rows chose the same expert (a product's rows are independent of each other), and its experts are added in the order
//! of their numbers, whatever stands beside it.

use candle_core::{DType, Result, Tensor};

use super::super::LoadError;
use super::super::apart::Destination;
use super::super::kernels::route::Choice;
use super::super::ops::Ops;
use super::super::weights::{Linear, Loader};
use super::block::Dense;
use crate::checkpoint::{Architecture, DenseKeys, Experts, LinearKeys};

#[derive(Debug)]
pub struct Mixture {
    router: Linear,
    experts: Vec<Dense>,
    shape: Experts,
    ops: Ops,
}

impl Mixture {
    pub fn load(
        architecture: &Architecture,
        router: &LinearKeys,
        experts: &[DenseKeys],
        loader: &mut Loader,
    ) -> std::result::Result<Self, LoadError> {
        let none = Experts { count: 0, per_token: 0, intermediate_size: 0, normalised: false };
        Ok(Self {
            router: loader.fused(&[router])?,
            experts: experts.iter().map(|keys| Dense::load(keys, loader)).collect::<std::result::Result<_, _>>()?,
            shape: architecture.experts.clone().unwrap_or(none),
            ops: loader.backend().ops,
        })
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        let experts = self.experts.iter().map(|expert| expert.on(to)).collect::<Result<_>>()?;
        Ok(Self { router: self.router.on(to)?, experts, shape: self.shape.clone(), ops: self.ops })
    }

    pub fn forward(&self, architecture: &Architecture, x: &Tensor) -> Result<Tensor> {
        let logits = self.router.forward_narrow(x)?.to_dtype(DType::F32)?;
        let Experts { count, per_token, intermediate_size, normalised } = self.shape;
        let choice = Choice { experts: count, per_token, normalised };
        self.ops.mix(x, &logits, choice, &mut |expert, own| self.experts[expert].forward(architecture, intermediate_size, own))
    }
}
