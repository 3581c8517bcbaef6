//! The seam between the forward pass and what computes it: each function takes tensors on one device and does there what
//! its kernel says. On the CPU that is [`super::kernels`]; anywhere else it is [`super::plain`], in operations of candle.

mod host;

use candle_core::{Result, Tensor};

use self::host::{Activate, AddBias, AddProduct, AddRows, Attend, Gate, NormOp, Overwrite, Project, ScatterAdd, Turn};
use super::kernels::attention::Shape as AttentionShape;
use super::kernels::distances::Distances;
use super::kernels::rope::HeadTransform;
use super::kernels::route::{Choice, Routed, route};
use super::pack::{MIN_ROWS, Pack};
use super::plain;
use super::prefixes::Memory;
use crate::checkpoint::{Activation, Norm};

/// Which of the two computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// Our kernels, on the CPU in float32, in place where they can be: a tensor that is handed over has no other use.
    Kernels,
    /// Operations of candle, on any device. What stands in the residual stream is in float32.
    Plain,
}

impl Ops {
    /// Normalises the rows of `x`.
    pub fn normalise(self, kind: Norm, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match (self, bias) {
            (Self::Plain, _) => plain::normalise(kind, x, weight, bias),
            (Self::Kernels, None) => x.apply_op2_no_bwd(weight, &NormOp(kind)),
            (Self::Kernels, Some(bias)) => x.apply_op3_no_bwd(weight, bias, &NormOp(kind)),
        }
    }

    /// `x + y`, where the rows of `y` may be wider than those of `x`.
    pub fn add(self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => plain::add(&x, y),
            Self::Kernels => x.inplace_op2(y, &AddRows).map(|()| x),
        }
    }

    /// `x` with the rows from `first` on replaced by those of `part`, which is as wide.
    pub fn overwrite(self, x: Tensor, first: usize, part: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => x.slice_assign(&[first..first + part.dim(0)?, 0..part.dim(1)?], part),
            Self::Kernels => x.inplace_op2(part, &Overwrite { first }).map(|()| x),
        }
    }

    /// `x + bias` on the first columns of every row.
    pub fn add_bias(self, x: Tensor, bias: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => x.broadcast_add(bias),
            Self::Kernels => x.inplace_op2(bias, &AddBias).map(|()| x),
        }
    }

    /// `act(x)`.
    pub fn activate(self, kind: Activation, x: Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => plain::activate(kind, &x),
            Self::Kernels => x.inplace_op1(&Activate(kind)).map(|()| x),
        }
    }

    /// `act(gate) * up` of rows `[gate | up | ...]`, `width` columns each.
    pub fn gate(self, kind: Activation, x: &Tensor, width: usize) -> Result<Tensor> {
        match self {
            Self::Plain => plain::gate(kind, x, width),
            Self::Kernels => x.apply_op1_no_bwd(&Gate { kind, width }),
        }
    }

    /// For every row of `x` the sum of what its experts `run` make of it, by their weights, in the order of their numbers. A row
    /// takes the experts of its largest `logits`, which has a column for each. `run` takes the number of an expert and the rows
    /// that chose it, and maybe one of them again.
    pub fn mix(self, x: &Tensor, logits: &Tensor, choice: Choice, run: Expert) -> Result<Tensor> {
        match self {
            Self::Plain => plain::mix(x, logits, choice, run),
            Self::Kernels => mix(x, &route(&logits.flatten_all()?.to_vec1::<f32>()?, choice), run),
        }
    }

    /// What rows are multiplied by, `[inputs, outputs]`, of a matrix that was stored as `[outputs, inputs]`: on the CPU a copy,
    /// because crate gemm would turn the stored matrix round in every product; elsewhere a view.
    pub fn weight(self, stored: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => stored.t(),
            Self::Kernels => stored.apply_op1_no_bwd(&Turn),
        }
    }

    /// `x F` by a narrow factor; on the CPU with the factor's padding.
    pub fn project(self, x: &Tensor, factor: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => x.to_dtype(factor.dtype())?.matmul(factor),
            Self::Kernels => x.apply_op2_no_bwd(factor, &Project),
        }
    }

    /// `y` with `x F` added to its columns from `first` on, `columns` of them.
    pub fn add_product(self, y: Tensor, x: &Tensor, factor: &Tensor, first: usize, columns: usize) -> Result<Tensor> {
        match self {
            Self::Plain => plain::add_product(&y, x, factor, first, columns),
            Self::Kernels => y.inplace_op3(x, factor, &AddProduct { first, columns }).map(|()| y),
        }
    }
}

/// Computes one expert on some rows; its own may be wider.
pub type Expert<'a> = &'a mut dyn FnMut(usize, &Tensor) -> Result<Tensor>;

fn mix(x: &Tensor, routed: &[Routed], run: Expert) -> Result<Tensor> {
    let output = x.zeros_like()?;
    for (expert, Routed { rows, weights }) in routed.iter().enumerate().filter(|(_, routed)| !routed.rows.is_empty()) {
        // At least so many rows that the product takes its usual path; what is added behind is not read.
        let mut gathered = rows.clone();
        gathered.resize(rows.len().max(MIN_ROWS), rows[0]);
        let own = x.index_select(&Tensor::new(gathered, x.device())?, 0)?;
        output.inplace_op2(&run(expert, &own)?, &ScatterAdd { rows, weights })?;
    }
    Ok(output)
}

/// Norms and rotates the query and key heads of `[queries | keys | values]` in place, on the CPU.
pub fn transform_heads(x: &Tensor, heads: Heads) -> Result<()> {
    x.inplace_op1(&heads)
}

/// Attention of `[queries | keys | values]` over the forest of the pack, on the CPU, in a layer of this number that goes by
/// `memory`.
pub fn attend(
    x: &Tensor,
    shape: &AttentionShape,
    distances: Option<Distances>,
    pack: &Pack,
    memory: Option<(&Memory, usize)>,
) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Attend { shape, distances, pack, memory })
}

/// What [`transform_heads`] needs beside the rows.
pub struct Heads<'a> {
    pub transform: HeadTransform<'a>,
    pub positions: &'a [u32],
}
