//! Norms over the rows of a matrix.

use super::math::{dot, sum};
use super::{RowKernel, for_rows};
use crate::checkpoint::Norm;

/// Normalises every row of `input` (rows `stride` apart, `width` wide) into `output` (contiguous).
pub fn normalise(kind: Norm, input: &[f32], stride: usize, weight: &[f32], bias: Option<&[f32]>, output: &mut [f32]) {
    for_rows(output, weight.len(), &Normalise { kind, input, stride, weight, bias });
}

struct Normalise<'a> {
    kind: Norm,
    input: &'a [f32],
    stride: usize,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl RowKernel for Normalise<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, rows: &mut [f32]) {
        let width = self.weight.len();
        for (row, output) in rows.chunks_exact_mut(width).enumerate() {
            let start = (first + row) * self.stride;
            one(self.kind, &self.input[start..start + width], self.weight, self.bias, output);
        }
    }
}

#[inline(always)]
fn one(kind: Norm, x: &[f32], weight: &[f32], bias: Option<&[f32]>, output: &mut [f32]) {
    match kind {
        Norm::Rms { eps } => {
            let scale = rms_scale(x, eps);
            for ((output, x), weight) in output.iter_mut().zip(x).zip(weight) {
                *output = x * scale * weight;
            }
        }
        Norm::Layer { eps } => {
            let count = x.len() as f32;
            let mean = sum(x, x, |x, _, sum| sum + x) / count;
            let variance = sum(x, x, |x, _, sum| (x - mean).mul_add(x - mean, sum)) / count;
            let scale = 1.0 / (variance + eps as f32).sqrt();
            for ((output, x), weight) in output.iter_mut().zip(x).zip(weight) {
                *output = (x - mean) * scale * weight;
            }
            if let Some(bias) = bias {
                for (output, bias) in output.iter_mut().zip(bias) {
                    *output += bias;
                }
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub fn rms_scale(x: &[f32], eps: f64) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference(kind: Norm, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let count = x.len() as f64;
        let (mean, eps, bias_on) = match kind {
            Norm::Rms { eps } => (0.0, eps, 0.0),
            Norm::Layer { eps } => (x.iter().sum::<f64>() / count, eps, 1.0),
        };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        x.iter()
            .zip(weight)
            .zip(bias)
            .map(|((x, w), b)| (x - mean) / (variance + eps).sqrt() * f64::from(*w) + bias_on * f64::from(*b))
            .collect()
    }

    proptest! {
        #[test]
        fn both_norms_agree_with_float64_and_read_strided_rows(rows in 1usize..5, width in 1usize..40, gap in 0usize..3, seed in any::<u32>()) {
            let stride = width + gap;
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8;
            let input: Vec<f32> = (0..rows * stride).map(value).collect();
            let weight: Vec<f32> = (0..width).map(|i| value(i + 1000)).collect();
            let bias: Vec<f32> = (0..width).map(|i| value(i + 2000)).collect();
            for kind in [Norm::Rms { eps: 1e-6 }, Norm::Layer { eps: 1e-6 }] {
                let mut output = vec![0.0; rows * width];
                normalise(kind, &input, stride, &weight, Some(&bias), &mut output);
                for row in 0..rows {
                    let exact = reference(kind, &input[row * stride..row * stride + width], &weight, &bias);
                    for (found, exact) in output[row * width..].iter().zip(exact) {
                        prop_assert!((f64::from(*found) - exact).abs() < 2e-4 * (1.0 + exact.abs()), "{found} {exact}");
                    }
                }
            }
        }
    }
}
