//! Activations, alone and fused with the gate's product.

use super::math::{erf, exp, tanh};
use super::{RowKernel, for_rows};
use crate::checkpoint::Activation;

/// `act(x)` in place.
pub fn activate(kind: Activation, data: &mut [f32], width: usize) {
    for_rows(data, width, &Activate(kind));
}

/// `act(gate) * up`: `input` holds rows of `[gate | up | ...]`, `stride` apart; `output` is contiguous, `width` wide.
pub fn gate(kind: Activation, input: &[f32], stride: usize, width: usize, output: &mut [f32]) {
    for_rows(output, width, &Gate { kind, input, stride, width });
}

struct Activate(Activation);

impl RowKernel for Activate {
    #[inline(always)]
    fn rows(&self, _: usize, rows: &mut [f32]) {
        apply(self.0, rows);
    }
}

struct Gate<'a> {
    kind: Activation,
    input: &'a [f32],
    stride: usize,
    width: usize,
}

impl RowKernel for Gate<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, rows: &mut [f32]) {
        for (row, output) in rows.chunks_exact_mut(self.width).enumerate() {
            let (gate, rest) = self.input[(first + row) * self.stride..].split_at(self.width);
            output.copy_from_slice(gate);
            apply(self.kind, output);
            for (output, up) in output.iter_mut().zip(&rest[..self.width]) {
                *output *= up;
            }
        }
    }
}

#[inline(always)]
fn apply(kind: Activation, values: &mut [f32]) {
    match kind {
        Activation::Silu => values.iter_mut().for_each(|x| *x = silu(*x)),
        Activation::Gelu => values.iter_mut().for_each(|x| *x = gelu(*x)),
        Activation::GeluTanh => values.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
        Activation::Relu => values.iter_mut().for_each(|x| *x = relu(*x)),
        Activation::Tanh => values.iter_mut().for_each(|x| *x = tanh(*x)),
    }
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x * Phi(x)`, with the error function.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The hyperbolic-tangent form: `0.5 x (1 + tanh(u)) = x * sigmoid(2u)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-2.0 * u))
}

/// Keeps a NaN a NaN, so that it is found instead of scored.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference(kind: Activation, x: f64) -> f64 {
        match kind {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
            Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()),
            Activation::Relu => x.max(0.0),
            Activation::Tanh => x.tanh(),
        }
    }

    const ALL: [Activation; 5] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh];

    proptest! {
        #[test]
        fn activations_agree_with_float64(x in -30.0f32..30.0, up in -3.0f32..3.0) {
            for kind in ALL {
                let exact = reference(kind, f64::from(x));
                let mut alone = [x];
                activate(kind, &mut alone, 1);
                prop_assert!((f64::from(alone[0]) - exact).abs() <= 1e-6 * (1.0 + exact.abs()), "{kind:?}({x}) = {} against {exact}", alone[0]);
                let mut gated = [0.0];
                gate(kind, &[x, up], 2, 1, &mut gated);
                prop_assert_eq!(gated[0], alone[0] * up);
            }
        }
    }

    #[test]
    fn a_nan_is_never_turned_into_a_number() {
        for kind in ALL {
            let mut value = [f32::NAN];
            activate(kind, &mut value, 1);
            assert!(value[0].is_nan(), "{kind:?}");
        }
    }
}
