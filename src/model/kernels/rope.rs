//! Rotary positions (RoFormer, 2104.09864), with the norms on query and key heads that some families put before them.

use std::sync::{Arc, RwLock};

use super::norm::rms_scale;
use super::{RowKernel, for_rows};
use crate::checkpoint::{Rope, RopeScaling};

/// Cosines and sines of one rotary embedding, for positions `0..rows`.
#[derive(Debug)]
pub struct Table {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Grows a [`Table`] to the longest sequence that was seen.
#[derive(Debug)]
pub struct Tables {
    frequencies: Vec<f32>,
    table: RwLock<Arc<Table>>,
}

impl Tables {
    pub fn new(rope: &Rope) -> Self {
        let frequencies = inverse_frequencies(rope);
        let empty = Table { half: frequencies.len(), cos: Vec::new(), sin: Vec::new() };
        Self { frequencies, table: RwLock::new(Arc::new(empty)) }
    }

    /// A table of at least `rows` positions.
    pub fn at_least(&self, rows: usize) -> Arc<Table> {
        // The lock guards one whole `Arc`, so a panic elsewhere cannot have left it half-written.
        let held = Arc::clone(&self.table.read().unwrap_or_else(|poisoned| poisoned.into_inner()));
        if held.rows() >= rows {
            return held;
        }
        let grown = Arc::new(Table::new(&self.frequencies, rows.next_power_of_two()));
        *self.table.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::clone(&grown);
        grown
    }
}

impl Table {
    fn new(frequencies: &[f32], rows: usize) -> Self {
        let mut table = Self {
            half: frequencies.len(),
            cos: Vec::with_capacity(rows * frequencies.len()),
            sin: Vec::with_capacity(rows * frequencies.len()),
        };
        for position in 0..rows {
            for frequency in frequencies {
                // transformers takes the product in float32 and only then the cosine.
                let angle = f64::from(position as f32 * frequency);
                table.cos.push(libm::cos(angle) as f32);
                table.sin.push(libm::sin(angle) as f32);
            }
        }
        table
    }

    fn rows(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }
}

/// Inverse frequencies, `dims / 2` of them, in float32 as transformers keeps them.
fn inverse_frequencies(rope: &Rope) -> Vec<f32> {
    let plain = (0..rope.dims / 2).map(|i| 1.0 / (rope.theta as f32).powf((2 * i) as f32 / rope.dims as f32));
    match rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => plain
            .map(|frequency| {
                // `_compute_llama3_parameters`: short wavelengths stay, long ones are scaled, those between are blended.
                let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
                if wavelength < original_positions / high_freq_factor {
                    frequency
                } else if wavelength > original_positions / low_freq_factor {
                    frequency / factor as f32
                } else {
                    let smooth = ((original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            })
            .collect(),
    }
}

/// What happens to every query and key head before attention.
pub struct HeadTransform<'a> {
    /// Heads in a row: queries first, then keys; values behind them stay as they are.
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    /// Weights of the norms on query and key heads, and their eps.
    pub norms: Option<(&'a [f32], &'a [f32], f64)>,
    pub table: Option<&'a Table>,
}

/// Norms and rotates the query and key heads of `data` (rows of `stride`) in place; row `i` stands at `positions[i]`.
pub fn transform_heads(transform: &HeadTransform, data: &mut [f32], stride: usize, positions: &[u32]) {
    for_rows(data, stride, &TransformRows { transform, stride, positions });
}

struct TransformRows<'a> {
    transform: &'a HeadTransform<'a>,
    stride: usize,
    positions: &'a [u32],
}

impl RowKernel for TransformRows<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, rows: &mut [f32]) {
        let transform = self.transform;
        for (row, values) in rows.chunks_exact_mut(self.stride).enumerate() {
            let position = self.positions[first + row] as usize;
            let heads = values.chunks_exact_mut(transform.head_dim).take(transform.query_heads + transform.key_heads);
            for (head, x) in heads.enumerate() {
                if let Some((query, key, eps)) = transform.norms {
                    let weight = if head < transform.query_heads { query } else { key };
                    let scale = rms_scale(x, eps);
                    for (x, weight) in x.iter_mut().zip(weight) {
                        *x = *x * scale * weight;
                    }
                }
                if let Some(table) = transform.table {
                    rotate(x, table, position);
                }
            }
        }
    }
}

/// Rotates the pairs `(x_i, x_{i + half})`, as transformers' `rotate_half` does.
#[inline(always)]
fn rotate(x: &mut [f32], table: &Table, position: usize) {
    let half = table.half;
    let cos = &table.cos[position * half..(position + 1) * half];
    let sin = &table.sin[position * half..(position + 1) * half];
    let (low, high) = x.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(dims: usize) -> Rope {
        Rope { theta: 10_000.0, dims, scaling: RopeScaling::None }
    }

    #[test]
    fn a_rotation_keeps_lengths_and_depends_on_the_distance_alone() {
        let tables = Tables::new(&plain(8));
        let table = tables.at_least(64);
        let (q, k) = ([0.3, -1.0, 0.5, 2.0, 1.0, 0.1, -0.7, 0.2], [1.0, 0.4, -0.2, 0.9, -1.5, 0.3, 0.8, -0.6]);
        let score = |i: usize, j: usize| {
            let (mut a, mut b) = (q, k);
            rotate(&mut a, &table, i);
            rotate(&mut b, &table, j);
            a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
        };
        assert!((score(7, 3) - score(44, 40)).abs() < 1e-4);
        assert!((score(7, 3) - score(7, 4)).abs() > 1e-2);
        let mut turned = q;
        rotate(&mut turned, &table, 33);
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        assert!((norm(&turned) - norm(&q)).abs() < 1e-5);
    }

    #[test]
    fn a_table_grows_and_keeps_its_values() {
        let tables = Tables::new(&plain(8));
        let small = tables.at_least(3);
        let large = tables.at_least(100);
        assert!(large.rows() >= 100);
        assert_eq!(small.cos[..], large.cos[..small.cos.len()]);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 128.0 };
        let scaled = inverse_frequencies(&Rope { theta: 500_000.0, dims: 64, scaling });
        let plain = inverse_frequencies(&Rope { theta: 500_000.0, dims: 64, scaling: RopeScaling::None });
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[31], plain[31] / 8.0);
        assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
    }
}
