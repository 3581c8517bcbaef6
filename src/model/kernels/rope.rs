//! Rotary positions (RoFormer, 2104.09864), with the norms on queries and keys that some families put before them.

use std::sync::{Arc, OnceLock, RwLock};

use candle_core::{Device, Result, Tensor};

use super::norm::rms_scale;
use super::{RowKernel, for_rows};
use crate::checkpoint::{Rope, RopeScaling};
use crate::model::pack::Pack;

/// Cosines and sines for positions `0..rows`.
#[derive(Debug)]
pub struct Table {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Both on the model's device, `[rows, half]`, once they were asked for there.
    placed: OnceLock<(Tensor, Tensor)>,
}

/// The tables of one rotary embedding. Which of them rotates a sample depends on the sample's own length, in embeddings
/// whose scaling does, and never on the pack.
#[derive(Debug)]
pub struct Tables {
    rope: Rope,
    /// The variants 0 and 1, each grown to the longest sequence that was seen. Others are as many as there are lengths.
    kept: [RwLock<Arc<Table>>; 2],
}

/// The tables that the samples of one pack are rotated by, and for every row which of them.
#[derive(Debug)]
pub struct Rotation {
    tables: Vec<Arc<Table>>,
    which: Vec<u32>,
}

impl Tables {
    pub fn new(rope: &Rope) -> Self {
        let empty = || RwLock::new(Arc::new(Table { half: rope.dims / 2, cos: Vec::new(), sin: Vec::new(), placed: OnceLock::new() }));
        Self { rope: rope.clone(), kept: [empty(), empty()] }
    }

    pub fn rotation(&self, pack: &Pack) -> Rotation {
        let mut rotation = Rotation { tables: Vec::new(), which: vec![0; pack.ids().len()] };
        let lengths: Vec<usize> = (0..pack.len()).map(|sample| pack.encoding(sample).tokens()).collect();
        let variants: Vec<usize> = lengths.iter().map(|tokens| self.rope.variant(*tokens)).collect();
        let mut known: Vec<usize> = Vec::new();
        for (sample, variant) in variants.iter().enumerate() {
            let index = known.iter().position(|known| known == variant).unwrap_or_else(|| {
                let rows = lengths.iter().zip(&variants).filter(|(_, other)| *other == variant).map(|(tokens, _)| *tokens).max();
                rotation.tables.push(self.table(*variant, rows.unwrap_or(0)));
                known.push(*variant);
                known.len() - 1
            });
            if index > 0 {
                for rows in pack.path(pack.leaf(sample)) {
                    rotation.which[rows].fill(index as u32);
                }
            }
        }
        if rotation.tables.is_empty() {
            rotation.tables.push(self.table(0, 1));
        }
        rotation
    }

    /// The table of a variant, of at least `rows` positions.
    fn table(&self, variant: usize, rows: usize) -> Arc<Table> {
        let frequencies = || inverse_frequencies(&self.rope, variant);
        let factor = self.rope.attention_factor as f32;
        let Some(kept) = self.kept.get(variant) else {
            return Arc::new(Table::new(&frequencies(), factor, rows));
        };
        // The lock guards one whole `Arc`, so a panic elsewhere cannot have left it half-written.
        let held = Arc::clone(&kept.read().unwrap_or_else(|poisoned| poisoned.into_inner()));
        if held.rows() >= rows {
            return held;
        }
        let grown = Arc::new(Table::new(&frequencies(), factor, rows.next_power_of_two()));
        *kept.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::clone(&grown);
        grown
    }
}

impl Rotation {
    /// Cosines and sines of every row of a pack on the device, `[rows, dims / 2]`, where row `i` stands at `positions[i]`.
    pub fn angles(&self, positions: &[u32], device: &Device) -> Result<(Tensor, Tensor)> {
        if let [table] = self.tables.as_slice() {
            let (cos, sin) = table.placed(device)?;
            let positions = Tensor::new(positions, device)?;
            return Ok((cos.index_select(&positions, 0)?, sin.index_select(&positions, 0)?));
        }
        let half = self.tables.first().map_or(0, |table| table.half);
        let (mut cos, mut sin) = (Vec::with_capacity(positions.len() * half), Vec::with_capacity(positions.len() * half));
        for (position, which) in positions.iter().zip(&self.which) {
            let (table, first) = (&self.tables[*which as usize], *position as usize * half);
            cos.extend_from_slice(&table.cos[first..first + half]);
            sin.extend_from_slice(&table.sin[first..first + half]);
        }
        let shape = (positions.len(), half);
        Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
    }
}

impl Table {
    fn new(frequencies: &[f32], factor: f32, rows: usize) -> Self {
        let mut table = Self {
            half: frequencies.len(),
            cos: Vec::with_capacity(rows * frequencies.len()),
            sin: Vec::with_capacity(rows * frequencies.len()),
            placed: OnceLock::new(),
        };
        for position in 0..rows {
            for frequency in frequencies {
                // transformers takes the product in float32 and only then the cosine.
                let angle = f64::from(position as f32 * frequency);
                table.cos.push(libm::cos(angle) as f32 * factor);
                table.sin.push(libm::sin(angle) as f32 * factor);
            }
        }
        table
    }

    fn placed(&self, device: &Device) -> Result<&(Tensor, Tensor)> {
        if self.placed.get().is_none() {
            let shape = (self.rows(), self.half);
            let table = (Tensor::from_slice(&self.cos, shape, device)?, Tensor::from_slice(&self.sin, shape, device)?);
            // For whichever thread comes next; another thread's copy is as good.
            device.synchronize()?;
            let _ = self.placed.set(table);
        }
        match self.placed.get() {
            Some(placed) => Ok(placed),
            None => candle_core::bail!("the rotary table is not on the device"),
        }
    }

    fn rows(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }
}

/// Inverse frequencies of one variant ([`Rope::variant`]), `dims / 2` of them, in float32 as transformers keeps them.
fn inverse_frequencies(rope: &Rope, variant: usize) -> Vec<f32> {
    let powers = |theta: f32| (0..rope.dims / 2).map(move |i| theta.powf((2 * i) as f32 / rope.dims as f32));
    let plain = || powers(rope.theta as f32).map(|power| 1.0 / power);
    match &rope.scaling {
        RopeScaling::None => plain().collect(),
        RopeScaling::Linear { factor } => plain().map(|frequency| frequency / *factor as f32).collect(),
        RopeScaling::Dynamic { .. } if variant == 0 => plain().collect(),
        RopeScaling::Dynamic { factor, original_positions } => {
            // `_compute_dynamic_ntk_parameters` computes the base in float32 once a sequence is longer than the original.
            let stretch = (*factor as f32 * variant as f32) / *original_positions as f32 - (*factor as f32 - 1.0);
            let exponent = rope.dims as f64 / (rope.dims as f64 - 2.0);
            powers(rope.theta as f32 * stretch.powf(exponent as f32)).map(|power| 1.0 / power).collect()
        }
        RopeScaling::LongRope { short, long, .. } => {
            let factors = if variant == 0 { short } else { long };
            powers(rope.theta as f32).zip(factors).map(|(power, factor)| 1.0 / (*factor as f32 * power)).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => plain()
            .map(|frequency| {
                // `_compute_llama3_parameters`: short wavelengths stay, long ones are scaled, those between are blended.
                let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
                if wavelength < original_positions / high_freq_factor {
                    frequency
                } else if wavelength > original_positions / low_freq_factor {
                    frequency / *factor as f32
                } else {
                    let smooth = ((original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)) as f32;
                    (1.0 - smooth) * frequency / *factor as f32 + smooth * frequency
                }
            })
            .collect(),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate } => {
            // `_compute_yarn_parameters`: dimensions that turn often keep their frequency, those that turn seldom are
            // scaled, and a ramp leads from the first to the second.
            let dims = rope.dims as f64;
            let dimension = |turns: f64| dims * (original_positions / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * rope.theta.ln());
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dims - 1.0));
            if low == high {
                high += 0.001;
            }
            powers(rope.theta as f32)
                .enumerate()
                .map(|(i, power)| {
                    let kept = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    1.0 / (*factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
                })
                .collect()
        }
    }
}

/// What happens to queries and keys before attention.
pub struct HeadTransform<'a> {
    /// Heads in a row: queries first, then keys; values behind them stay as they are.
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    /// Weights of the norms on queries and keys, and their eps. A weight is as long as what is normed at once: one head,
    /// or all of them.
    pub norms: Option<(&'a [f32], &'a [f32], f64)>,
    pub rotation: Option<&'a Rotation>,
}

/// Norms and rotates the queries and keys of `data` (rows of `stride`) in place; row `i` stands at `positions[i]`.
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
        let HeadTransform { query_heads, key_heads, head_dim, norms, rotation } = *self.transform;
        for (row, values) in rows.chunks_exact_mut(self.stride).enumerate() {
            let (queries, rest) = values.split_at_mut(query_heads * head_dim);
            let keys = &mut rest[..key_heads * head_dim];
            if let Some((query, key, eps)) = norms {
                norm(queries, query, eps);
                norm(keys, key, eps);
            }
            if let Some(rotation) = rotation {
                let table = &rotation.tables[rotation.which[first + row] as usize];
                let position = self.positions[first + row] as usize;
                for head in queries.chunks_exact_mut(head_dim).chain(keys.chunks_exact_mut(head_dim)) {
                    rotate(head, table, position);
                }
            }
        }
    }
}

/// A root-mean-square norm over every stretch of `x` that is as long as the weight.
#[inline(always)]
fn norm(x: &mut [f32], weight: &[f32], eps: f64) {
    for x in x.chunks_exact_mut(weight.len()) {
        let scale = rms_scale(x, eps);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }
}

/// Rotates the pairs `(x_i, x_{i + half})` of the leading dimensions, as transformers' `rotate_half` does.
#[inline(always)]
fn rotate(x: &mut [f32], table: &Table, position: usize) {
    let half = table.half;
    let cos = &table.cos[position * half..(position + 1) * half];
    let sin = &table.sin[position * half..(position + 1) * half];
    let (low, rest) = x.split_at_mut(half);
    let high = &mut rest[..half];
    for i in 0..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, dims: usize, scaling: RopeScaling) -> Rope {
        Rope { theta, dims, scaling, attention_factor: 1.0 }
    }

    fn plain(dims: usize) -> Rope {
        rope(10_000.0, dims, RopeScaling::None)
    }

    #[test]
    fn a_rotation_keeps_lengths_and_depends_on_the_distance_alone() {
        let tables = Tables::new(&plain(8));
        let table = tables.table(0, 64);
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
        let small = tables.table(0, 3);
        let large = tables.table(0, 100);
        assert!(large.rows() >= 100);
        assert_eq!(small.cos[..], large.cos[..small.cos.len()]);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 128.0 };
        let scaled = inverse_frequencies(&rope(500_000.0, 64, scaling), 0);
        let plain = inverse_frequencies(&rope(500_000.0, 64, RopeScaling::None), 0);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[31], plain[31] / 8.0);
        assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
    }
}
