//! The forward pass in operations of candle alone, for devices that our kernels do not run on. The residual stream, norms
//! and attention are in float32; matrices are multiplied in what they are stored in.
//!
//! It runs on the CPU as well: there it is held to the same golden scores as the kernels.

mod attention;
mod mixture;
mod plan;

use candle_core::{DType, Result, Tensor};
use candle_nn::ops::{layer_norm, rms_norm};

use super::weights::narrowed;
use crate::checkpoint::{Activation, Norm};
pub use attention::{Embedded, Heads, PackPlan, flash_differences};
pub use mixture::{grouped_difference, mix, mix_in_tiles};
pub use plan::ELEMENTS;

/// Normalises the leading columns of every row, as many as there are weights, in float32.
pub fn normalise(kind: Norm, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = narrowed(x, weight.dim(0)?)?.to_dtype(DType::F32)?.contiguous()?;
    match (kind, bias) {
        (Norm::Rms { eps }, _) => rms_norm(&x, weight, eps as f32),
        (Norm::Layer { eps }, Some(bias)) => layer_norm(&x, weight, bias, eps as f32),
        (Norm::Layer { eps }, None) => layer_norm(&x, weight, &weight.zeros_like()?, eps as f32),
    }
}

/// `x + y` in the type of `x`.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    x + narrowed(y, x.dim(1)?)?.to_dtype(x.dtype())?
}

pub fn activate(kind: Activation, x: &Tensor) -> Result<Tensor> {
    // Of 16-bit numbers candle's kernels for cards round every step of these, but for those that have one step, and for the one
    // that they compute in float32 (`unary.cu`).
    let stepwise = match (kind, x.dtype()) {
        (_, DType::F32) | (Activation::Relu | Activation::Tanh, _) | (Activation::Silu, DType::BF16) => false,
        (Activation::Silu | Activation::Gelu | Activation::GeluTanh, _) => true,
    };
    if stepwise {
        return activate(kind, &x.to_dtype(DType::F32)?)?.to_dtype(x.dtype());
    }
    match kind {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        // A product and not a maximum, which would turn a NaN into a zero.
        Activation::Relu => x * x.ge(0f64)?.to_dtype(x.dtype())?,
        Activation::Tanh => x.tanh(),
    }
}

/// `act(gate) * up` of rows `[gate | up]`.
pub fn gate(kind: Activation, x: &Tensor, width: usize) -> Result<Tensor> {
    activate(kind, &x.narrow(1, 0, width)?)? * x.narrow(1, width, width)?
}

/// `y` with `x F` added to some of its columns, in the type of `y`.
pub fn add_product(y: &Tensor, x: &Tensor, factor: &Tensor, first: usize, columns: usize) -> Result<Tensor> {
    let product = x.contiguous()?.matmul(factor)?.to_dtype(y.dtype())?;
    let (width, end) = (y.dim(1)?, first + columns);
    if columns == width {
        return y + product;
    }
    let changed = (y.narrow(1, first, columns)? + product)?;
    let around = [(0, first), (end, width - end)].map(|(first, columns)| (columns > 0).then(|| y.narrow(1, first, columns)));
    let [before, behind] = around.map(Option::transpose);
    let parts: Vec<Tensor> = before?.into_iter().chain([changed]).chain(behind?).collect();
    Tensor::cat(&parts, 1)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::model::ops::Ops;

    fn matrix(rows: usize, columns: usize, seed: u32) -> Tensor {
        let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 4e6 - 2.0;
        Tensor::from_vec((0..rows * columns).map(value).collect(), (rows, columns), &Device::Cpu).expect("a matrix")
    }

    fn near(one: &Tensor, other: &Tensor) -> bool {
        let values = |tensor: &Tensor| tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>()).expect("values");
        let (one, other) = (values(one), values(other));
        one.len() == other.len() && one.iter().zip(&other).all(|(a, b)| (a - b).abs() <= 2e-5 * (1.0 + b.abs()))
    }

    #[test]
    fn both_sides_of_the_seam_agree() {
        let (weight, bias) = (matrix(1, 12, 5).squeeze(0).expect("a row"), matrix(1, 12, 6).squeeze(0).expect("a row"));
        let both = |run: &dyn Fn(Ops) -> Result<Tensor>, what: &str| {
            let (kernels, plain) = (run(Ops::Kernels).expect("kernels"), run(Ops::Plain).expect("plain"));
            assert!(near(&plain, &kernels), "{what}: {plain} against {kernels}");
        };
        for kind in [Norm::Rms { eps: 1e-5 }, Norm::Layer { eps: 1e-5 }] {
            // Rows that are wider than the norm.
            both(&|ops| ops.normalise(kind, &matrix(5, 16, 1), &weight, None), "a norm");
        }
        both(&|ops| ops.normalise(Norm::Layer { eps: 1e-5 }, &matrix(5, 12, 1), &weight, Some(&bias)), "a norm with a bias");
        both(&|ops| ops.add(matrix(5, 12, 1), &matrix(5, 16, 2)), "a sum");
        both(&|ops| ops.add_bias(matrix(5, 12, 1), &bias), "a bias");
        for kind in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh] {
            both(&|ops| ops.activate(kind, matrix(5, 12, 1)), kind.name());
            both(&|ops| ops.gate(kind, &matrix(5, 24, 1), 12), kind.name());
        }
        let factor = |ops: Ops, depth: usize| {
            // The kernels read padding, which candle's operations do without.
            let whole = matrix(depth, 32, 7);
            if ops == Ops::Kernels { Ok(whole) } else { whole.narrow(1, 0, 9)?.contiguous() }
        };
        for first in [0, 2, 3] {
            both(&|ops| ops.add_product(matrix(5, 12, 1), &matrix(5, 3, 2), &factor(ops, 3)?, first, 9), "a product on some columns");
        }
        both(&|ops| ops.project(&matrix(5, 12, 1), &factor(ops, 12)?)?.narrow(1, 0, 9)?.contiguous(), "a narrow product");
    }

    #[test]
    fn a_nan_is_never_turned_into_a_number() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh] {
            let value = Tensor::new(&[[f32::NAN]], &Device::Cpu).expect("a matrix");
            assert!(activate(kind, &value).and_then(|y| y.to_vec2::<f32>()).expect("a value")[0][0].is_nan(), "{kind:?}");
        }
    }
}
