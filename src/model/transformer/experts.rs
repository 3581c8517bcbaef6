//! A mixture of experts: a router gives every token a few MLPs, and their outputs are added by its weights.
//!
//! Every expert sees only the rows that chose it, gathered into one product, or into its part of one product of all. A row's result does not depend on which other
//! rows chose the same expert (a product's rows are independent of each other), and its experts are added in the order
//! of their numbers, whatever stands beside it.

use candle_core::{DType, Result, Tensor};

use super::super::LoadError;
use super::super::apart::Destination;
use super::super::device::{Grouped, Stack, Tiles, Tiling};
use super::super::kernels::route::Choice;
use super::super::ops::Ops;
use super::super::plain;
use super::super::weights::{Linear, Loader};
use super::block::Dense;
use crate::checkpoint::{Architecture, DenseKeys, Experts, LinearKeys};

#[derive(Debug)]
pub struct Mixture {
    router: Linear,
    experts: Vec<Dense>,
    /// The same weights where the device groups rows by itself.
    stacked: Option<Stacked>,
    shape: Experts,
    ops: Ops,
}

/// The weights of all experts, first those into the activation and then those out of it.
#[derive(Debug)]
struct Stacked {
    up: Stack,
    down: Stack,
    grouped: &'static dyn Grouped,
    fixed_rows: Option<usize>,
}

impl Stacked {
    /// `None` where experts have more than weights: a bias, or what an adapter adds.
    fn of(experts: &[Dense], grouped: &'static dyn Grouped, fixed_rows: Option<usize>) -> Result<Option<Self>> {
        let Some(weights) = experts.iter().map(Dense::weights).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let (up, down) = weights.into_iter().map(|[up, down]| (up.clone(), down.clone())).unzip();
        Ok(Some(Self { up: Stack::new(up, grouped)?, down: Stack::new(down, grouped)?, grouped, fixed_rows }))
    }

    /// See [`plain::mix_in_tiles`].
    fn forward(&self, architecture: &Architecture, ops: Ops, width: usize, x: &Tensor, tiles: &Tiles) -> Result<Tensor> {
        let inner = Dense::activated(architecture, ops, width, self.up.multiply(x, tiles)?)?;
        self.down.multiply(&inner, tiles)
    }
}

impl Mixture {
    pub fn load(
        architecture: &Architecture,
        router: &LinearKeys,
        experts: &[DenseKeys],
        loader: &mut Loader,
    ) -> std::result::Result<Self, LoadError> {
        let none = Experts { count: 0, per_token: 0, intermediate_size: 0, normalised: false };
        let router = loader.fused(&[router])?;
        let experts = experts.iter().map(|keys| Dense::load(keys, loader)).collect::<std::result::Result<Vec<_>, _>>()?;
        let backend = loader.backend();
        let stacked = backend.grouped.map(|grouped| Stacked::of(&experts, grouped, backend.fixed_rows)).transpose()?.flatten();
        Ok(Self { router, experts, stacked, shape: architecture.experts.clone().unwrap_or(none), ops: backend.ops })
    }

    /// Whether rows are grouped on the device.
    pub fn groups_rows(&self) -> bool {
        self.stacked.is_some()
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        let experts = self.experts.iter().map(|expert| expert.on(to)).collect::<Result<Vec<_>>>()?;
        let again = |stacked: &Stacked| Stacked::of(&experts, stacked.grouped, stacked.fixed_rows);
        let stacked = self.stacked.as_ref().map(again).transpose()?.flatten();
        Ok(Self { router: self.router.on(to)?, experts, stacked, shape: self.shape.clone(), ops: self.ops })
    }

    pub fn forward(&self, architecture: &Architecture, x: &Tensor) -> Result<Tensor> {
        let logits = self.router.forward_narrow(x)?.to_dtype(DType::F32)?;
        let Experts { count, per_token, intermediate_size, normalised } = self.shape;
        let choice = Choice { experts: count, per_token, normalised };
        if let Some(stacked) = &self.stacked {
            let tiling = Tiling::of(x.dim(0)? * choice.chosen(), count, stacked.fixed_rows);
            let run = |own: &Tensor, tiles: &Tiles| stacked.forward(architecture, self.ops, intermediate_size, own, tiles);
            return plain::mix_in_tiles(x, &logits, choice, (stacked.grouped, tiling), run);
        }
        self.ops.mix(x, &logits, choice, &mut |expert, own| self.experts[expert].forward(architecture, intermediate_size, own))
    }
}
