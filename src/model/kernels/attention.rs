//! Attention over a forest of token runs, on the CPU.
//!
//! Queries go in tiles of [`TILE`] rows, keys in blocks of [`BLOCK`] that start at absolute position 0 of a path, never
//! at the offset of a node or a pack: so a query meets the same blocks in the same order wherever its sample stands and
//! however much of its prompt is shared. Softmax runs along the blocks (Milakov and Gimelshein, 1805.02867): a masked
//! key adds exactly nothing, and a block of nothing but masked keys leaves every bit as it was.

use rayon::prelude::*;

use super::math::{LANES, exp, fold};
use super::{Vectorised, vectorised};
use crate::model::pack::Pack;

/// Products of queries and keys below which a hand-over to another thread costs more than the work.
const ALONE: usize = 1 << 18;
/// Query rows that share the loads of a key block.
const TILE: usize = 4;
/// Keys in a block.
const BLOCK: usize = 64;
/// Value columns that are summed at once.
const COLUMNS: usize = 32;
/// Below every score that a model can produce, and finite, so that differences with it are numbers.
const LOWEST: f32 = -1e30;

/// The shape of one layer's attention.
#[derive(Clone, Debug)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub causal: bool,
    /// A query sees the keys at most `window - 1` positions before it.
    pub window: Option<usize>,
}

/// `softmax(q k^T * scale) v` for every node of the pack. `data` has one row a token, `stride` apart, that begins with
/// `[queries | keys | values]`; the output has `heads * head_dim` columns, and zeros in rows that belong to no node.
pub fn attend(shape: &Shape, pack: &Pack, data: &[f32], stride: usize, rows: usize) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    let tasks: Vec<(usize, usize)> =
        (0..pack.nodes().len()).flat_map(|node| (0..shape.kv_heads).map(move |kv_head| (node, kv_head))).collect();
    let run = |&(node, kv_head): &(usize, usize)| vectorised(OneNode { shape, pack, data, stride, node, kv_head });
    let products: usize = pack.nodes().iter().map(|node| node.rows.len() * (node.start + node.rows.len())).sum();
    let parts: Vec<Vec<f32>> =
        if products * width <= ALONE { tasks.iter().map(run).collect() } else { tasks.par_iter().map(run).collect() };
    let mut output = vec![0.0f32; rows * width];
    for ((node, kv_head), part) in tasks.into_iter().zip(parts) {
        let first_column = kv_head * group * shape.head_dim;
        for (row, values) in pack.nodes()[node].rows.clone().zip(part.chunks_exact(group * shape.head_dim)) {
            let start = row * width + first_column;
            output[start..start + values.len()].copy_from_slice(values);
        }
    }
    output
}

struct OneNode<'a> {
    shape: &'a Shape,
    pack: &'a Pack,
    data: &'a [f32],
    stride: usize,
    node: usize,
    kv_head: usize,
}

impl Vectorised for OneNode<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn call(self) -> Vec<f32> {
        one_node(self.shape, self.pack, self.data, self.stride, self.node, self.kv_head)
    }
}

/// The queries of one node in the query heads that read one key head: `[queries, group, head_dim]`.
#[inline(always)]
fn one_node(shape: &Shape, pack: &Pack, data: &[f32], stride: usize, node: usize, kv_head: usize) -> Vec<f32> {
    let dim = shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    let keys = Keys::gather(shape, pack, data, stride, node, kv_head);
    let node = &pack.nodes()[node];
    let mut output = vec![0.0f32; node.rows.len() * group * dim];
    let mut tile = Tile::new(dim, keys.columns);
    // One list of (query, head) rows: the heads of a group read the same keys, so they fill tiles together.
    let total = node.rows.len() * group;
    for first in (0..total).step_by(TILE) {
        let members = TILE.min(total - first);
        let mut seen = [(0, 0); TILE];
        tile.clear();
        for (slot, seen) in seen.iter_mut().enumerate().take(members) {
            let (query, head) = ((first + slot) / group, (first + slot) % group);
            let start = (node.rows.start + query) * stride + (kv_head * group + head) * dim;
            tile.query[slot * dim..(slot + 1) * dim].copy_from_slice(&data[start..start + dim]);
            *seen = visible(shape, node.start + query, keys.count);
        }
        let from = seen[..members].iter().map(|range| range.0).min().unwrap_or(0) / BLOCK;
        let to = seen[..members].iter().map(|range| range.1).max().unwrap_or(0).div_ceil(BLOCK);
        for block in from..to {
            tile.absorb(&keys, block, &seen, shape.scale);
        }
        for slot in 0..members {
            tile.finish(slot, &mut output[(first + slot) * dim..(first + slot + 1) * dim]);
        }
    }
    output
}

/// The keys that the query at `position` sees, as a half-open range.
fn visible(shape: &Shape, position: usize, keys: usize) -> (usize, usize) {
    let end = if shape.causal { position + 1 } else { keys };
    let start = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
    (start, end)
}

/// The keys of a path in blocks of `[head_dim][BLOCK]`, its values in rows of `columns`; both padded with zeros.
struct Keys {
    count: usize,
    columns: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Keys {
    #[inline(always)]
    fn gather(shape: &Shape, pack: &Pack, data: &[f32], stride: usize, node: usize, kv_head: usize) -> Self {
        let dim = shape.head_dim;
        let columns = dim.next_multiple_of(COLUMNS);
        let path = pack.path(node);
        let count: usize = path.iter().map(ExactSizeIterator::len).sum();
        let padded = count.next_multiple_of(BLOCK);
        let mut keys = vec![0.0f32; padded * dim];
        let mut values = vec![0.0f32; padded * columns];
        let key_column = (shape.heads + kv_head) * dim;
        let value_column = (shape.heads + shape.kv_heads + kv_head) * dim;
        for (position, row) in path.into_iter().flatten().enumerate() {
            let key = &data[row * stride + key_column..][..dim];
            let block = &mut keys[position / BLOCK * BLOCK * dim..];
            for (d, key) in key.iter().enumerate() {
                block[d * BLOCK + position % BLOCK] = *key;
            }
            values[position * columns..][..dim].copy_from_slice(&data[row * stride + value_column..][..dim]);
        }
        Self { count, columns, keys, values }
    }
}

/// A few query rows, and what they have gathered so far.
struct Tile {
    dim: usize,
    columns: usize,
    query: Vec<f32>,
    /// The largest score seen.
    top: [f32; TILE],
    /// The sum of the weights, relative to `top`.
    sum: [f32; TILE],
    /// The weighted sum of the values, relative to `top`: `[columns / COLUMNS][TILE][COLUMNS]`.
    gathered: Vec<[[f32; COLUMNS]; TILE]>,
}

impl Tile {
    fn new(dim: usize, columns: usize) -> Self {
        Self {
            dim,
            columns,
            query: vec![0.0; TILE * dim],
            top: [LOWEST; TILE],
            sum: [0.0; TILE],
            gathered: vec![[[0.0; COLUMNS]; TILE]; columns / COLUMNS],
        }
    }

    #[inline(always)]
    fn clear(&mut self) {
        self.query.fill(0.0);
        self.top = [LOWEST; TILE];
        self.sum = [0.0; TILE];
        self.gathered.fill([[0.0; COLUMNS]; TILE]);
    }

    /// Adds one block of keys to what every row has gathered.
    #[inline(always)]
    fn absorb(&mut self, keys: &Keys, block: usize, seen: &[(usize, usize); TILE], scale: f32) {
        let mut weights = self.products(&keys.keys[block * BLOCK * self.dim..][..BLOCK * self.dim]);
        let mut shrink = [1.0f32; TILE];
        for slot in 0..TILE {
            let from = seen[slot].0.saturating_sub(block * BLOCK).min(BLOCK);
            let to = seen[slot].1.saturating_sub(block * BLOCK).min(BLOCK);
            let row = &mut weights[slot];
            let mut tops = [self.top[slot]; LANES];
            for (j, weight) in row.iter_mut().enumerate() {
                *weight *= scale;
                let counted = if j >= from && j < to { *weight } else { LOWEST };
                tops[j % LANES] = if counted > tops[j % LANES] { counted } else { tops[j % LANES] };
            }
            let top = tops.iter().fold(LOWEST, |top, other| if *other > top { *other } else { top });
            shrink[slot] = exp(self.top[slot] - top);
            let mut lanes = [0.0f32; LANES];
            for (j, weight) in row.iter_mut().enumerate() {
                *weight = if j >= from && j < to { exp(*weight - top) } else { 0.0 };
                lanes[j % LANES] += *weight;
            }
            self.top[slot] = top;
            self.sum[slot] = self.sum[slot].mul_add(shrink[slot], fold(lanes));
        }
        let values = &keys.values[block * BLOCK * self.columns..][..BLOCK * self.columns];
        for (part, gathered) in self.gathered.iter_mut().enumerate() {
            let mut held = *gathered;
            for slot in 0..TILE {
                for held in &mut held[slot] {
                    *held *= shrink[slot];
                }
            }
            for j in 0..BLOCK {
                let value = &values[j * self.columns + part * COLUMNS..][..COLUMNS];
                for slot in 0..TILE {
                    let weight = weights[slot][j];
                    for (held, value) in held[slot].iter_mut().zip(value) {
                        *held = weight.mul_add(*value, *held);
                    }
                }
            }
            *gathered = held;
        }
    }

    /// Products of every query row with every key of one block; each is one chain of additions along the head.
    #[inline(always)]
    fn products(&self, keys: &[f32]) -> [[f32; BLOCK]; TILE] {
        let mut products = [[0.0f32; BLOCK]; TILE];
        for (d, key) in keys.chunks_exact(BLOCK).enumerate() {
            for (slot, products) in products.iter_mut().enumerate() {
                let query = self.query[slot * self.dim + d];
                for (product, key) in products.iter_mut().zip(key) {
                    *product = query.mul_add(*key, *product);
                }
            }
        }
        products
    }

    #[inline(always)]
    fn finish(&self, slot: usize, output: &mut [f32]) {
        for (part, output) in output.chunks_mut(COLUMNS).enumerate() {
            for (output, gathered) in output.iter_mut().zip(&self.gathered[part][slot]) {
                *output = gathered / self.sum[slot];
            }
        }
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
