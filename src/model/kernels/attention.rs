//! Attention over a forest of token runs, on the CPU.
//!
//! Queries go in tiles of [`TILE`] rows, keys in blocks of [`BLOCK`] that start at absolute position 0 of a path, never
//! at the offset of a node or a pack: so a query meets the same blocks in the same order wherever its sample stands and
//! however much of its prompt is shared. Softmax runs along the blocks (Milakov and Gimelshein, 1805.02867): a masked
//! key adds exactly nothing, and a block of nothing but masked keys leaves every bit as it was.

use pulp::Simd;
use rayon::prelude::*;

use super::distances::{Distances, HeadBias};
use super::math::tanh;
use super::tile::{self, ROWS, Rows, Running, multiply_add};
use crate::model::pack::Pack;

/// Products of queries and keys below which a hand-over to another thread costs more than the work.
const ALONE: usize = 1 << 18;
/// Keys in a block.
pub const BLOCK: usize = 64;
/// Queries of one task, at most: long nodes are spread over threads, and keys are gathered once for all of a task.
const QUERIES: usize = 512;

/// The shape of one layer's attention.
#[derive(Clone, Debug)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    /// Products beyond this are bent back: `cap * tanh(product / cap)`.
    pub softcap: Option<f32>,
    pub causal: bool,
    /// A query sees only keys that are less than this many positions away.
    pub window: Option<usize>,
}

/// `softmax(bend(q k^T * scale)) v` for every node of the pack. `data` has one row a token, `stride` apart, that begins with
/// `[queries | keys | values]`; the output has `heads * head_dim` columns, and zeros in rows that belong to no node.
/// `distances` are DeBERTa's, whose every query head has a key head of its own.
pub fn attend(shape: &Shape, distances: Option<Distances>, pack: &Pack, data: &[f32], stride: usize, rows: usize) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    let tasks: Vec<Task> = (0..pack.nodes().len())
        .flat_map(|node| (0..pack.nodes()[node].rows.len()).step_by(QUERIES).map(move |first| (node, first)))
        .flat_map(|(node, first)| {
            (0..shape.kv_heads).map(move |kv_head| Task { shape, distances, pack, data, stride, node, first, kv_head })
        })
        .collect();
    let run = |task: &Task| pulp::Arch::new().dispatch(*task);
    let products: usize = pack.nodes().iter().map(|node| node.rows.len() * (node.start + node.rows.len())).sum();
    let parts: Vec<Vec<f32>> =
        if products * width <= ALONE { tasks.iter().map(run).collect() } else { tasks.par_iter().map(run).collect() };
    let mut output = vec![0.0f32; rows * width];
    for (task, part) in tasks.into_iter().zip(parts) {
        let first_column = task.kv_head * group * shape.head_dim;
        for (row, values) in task.rows().zip(part.chunks_exact(group * shape.head_dim)) {
            let start = row * width + first_column;
            output[start..start + values.len()].copy_from_slice(values);
        }
    }
    output
}

/// Some queries of one node, in the query heads that read one key head.
#[derive(Clone, Copy)]
struct Task<'a> {
    shape: &'a Shape,
    distances: Option<Distances<'a>>,
    pack: &'a Pack,
    data: &'a [f32],
    stride: usize,
    node: usize,
    /// The first of at most [`QUERIES`] queries, counted within the node.
    first: usize,
    kv_head: usize,
}

impl Task<'_> {
    /// The rows of its queries.
    fn rows(&self) -> std::ops::Range<usize> {
        let node = &self.pack.nodes()[self.node].rows;
        node.start + self.first..node.end.min(node.start + self.first + QUERIES)
    }
}

impl pulp::WithSimd for Task<'_> {
    type Output = Vec<f32>;

    /// `[queries, group, head_dim]`.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Self { shape, distances, pack, data, stride, node, first, kv_head } = self;
        let (dim, group, rows) = (shape.head_dim, shape.heads / shape.kv_heads, self.rows());
        // The position of the task's first query.
        let start = pack.nodes()[node].start + first;
        let (_, end) = visible(shape, start + rows.len() - 1, usize::MAX);
        let keys = Keys::gather(&self, end);
        let mut bias = distances.map(|distances| distances.of_head(simd, kv_head, keys.count, |key, into| keys.copy(key, into)));
        let mut output = vec![0.0f32; rows.len() * group * dim];
        let mut tile = Tile::new(dim, keys.columns);
        // One list of (query, head) rows: the heads of a group read the same keys, so they fill tiles together.
        let total = rows.len() * group;
        for first in (0..total).step_by(ROWS) {
            let members = ROWS.min(total - first);
            let mut seen = [(0, 0); ROWS];
            tile.clear();
            for (slot, seen) in seen.iter_mut().enumerate().take(members) {
                let (query, head) = ((first + slot) / group, (first + slot) % group);
                let from = (rows.start + query) * stride + (kv_head * group + head) * dim;
                tile.query[slot * dim..(slot + 1) * dim].copy_from_slice(&data[from..from + dim]);
                *seen = visible(shape, start + query, keys.count);
            }
            let from = seen[..members].iter().map(|range| range.0).min().unwrap_or(0) / BLOCK;
            let to = seen[..members].iter().map(|range| range.1).max().unwrap_or(0).div_ceil(BLOCK);
            if let Some(bias) = &mut bias {
                bias.turn(simd, &tile.query, start + first..start + first + members);
            }
            for block in from..to {
                tile.absorb(simd, &keys, block, &seen, shape, bias.as_ref());
            }
            for slot in 0..members {
                tile.finish(slot, &mut output[(first + slot) * dim..(first + slot + 1) * dim]);
            }
        }
        output
    }
}

/// The keys that the query at `position` sees, as a half-open range.
fn visible(shape: &Shape, position: usize, keys: usize) -> (usize, usize) {
    let end = match shape.window {
        _ if shape.causal => position + 1,
        Some(window) => keys.min(position + window),
        None => keys,
    };
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
    /// The keys and values of the task's path, up to position `end`.
    #[inline(always)]
    fn gather(task: &Task, end: usize) -> Self {
        let &Task { shape, pack, data, stride, node, kv_head, .. } = task;
        let dim = shape.head_dim;
        let columns = dim.next_multiple_of(tile::WIDTH);
        let path = pack.path(node);
        let count = path.iter().map(ExactSizeIterator::len).sum::<usize>().min(end);
        let padded = count.next_multiple_of(BLOCK);
        let mut keys = vec![0.0f32; padded * dim];
        let mut values = vec![0.0f32; padded * columns];
        let key_column = (shape.heads + kv_head) * dim;
        let value_column = (shape.heads + shape.kv_heads + kv_head) * dim;
        for (position, row) in path.into_iter().flatten().take(count).enumerate() {
            let key = &data[row * stride + key_column..][..dim];
            let block = &mut keys[position / BLOCK * BLOCK * dim..];
            for (d, key) in key.iter().enumerate() {
                block[d * BLOCK + position % BLOCK] = *key;
            }
            values[position * columns..][..dim].copy_from_slice(&data[row * stride + value_column..][..dim]);
        }
        Self { count, columns, keys, values }
    }

    /// The key of one position.
    fn copy(&self, position: usize, into: &mut [f32]) {
        let block = &self.keys[position / BLOCK * BLOCK * into.len()..];
        for (d, into) in into.iter_mut().enumerate() {
            *into = block[d * BLOCK + position % BLOCK];
        }
    }
}

/// A few query rows, and what they have gathered so far.
struct Tile {
    dim: usize,
    columns: usize,
    /// `[ROWS, dim]`.
    query: Vec<f32>,
    running: [Running; ROWS],
    /// Scores of one block of keys, and then their weights.
    scores: [[f32; BLOCK]; ROWS],
    /// The weighted sum of the values, relative to the largest score: `[ROWS, columns]`.
    gathered: Vec<f32>,
}

impl Tile {
    fn new(dim: usize, columns: usize) -> Self {
        let (query, gathered) = (vec![0.0; ROWS * dim], vec![0.0; ROWS * columns]);
        Self { dim, columns, query, running: [Running::EMPTY; ROWS], scores: [[0.0; BLOCK]; ROWS], gathered }
    }

    #[inline(always)]
    fn clear(&mut self) {
        self.query.fill(0.0);
        self.running = [Running::EMPTY; ROWS];
        self.gathered.fill(0.0);
    }

    /// Adds one block of keys to what every row has gathered.
    #[inline(always)]
    fn absorb<S: Simd>(
        &mut self,
        simd: S,
        keys: &Keys,
        block: usize,
        seen: &[(usize, usize); ROWS],
        shape: &Shape,
        bias: Option<&HeadBias>,
    ) {
        let (dim, columns) = (self.dim, self.columns);
        self.scores = [[0.0; BLOCK]; ROWS];
        let queries = Rows { values: &self.query, stride: dim };
        let block_keys = Rows { values: &keys.keys[block * BLOCK * dim..], stride: BLOCK };
        multiply_add(simd, queries, block_keys, dim, self.scores.as_flattened_mut(), BLOCK);
        for (slot, scores) in self.scores.iter_mut().enumerate() {
            if let Some(bias) = bias {
                bias.add(slot, block, scores);
            }
            for score in scores.iter_mut() {
                *score *= shape.scale;
            }
            if let Some(cap) = shape.softcap {
                for score in scores.iter_mut() {
                    *score = cap * tanh(*score / cap);
                }
            }
            let from = seen[slot].0.saturating_sub(block * BLOCK).min(BLOCK);
            let to = seen[slot].1.saturating_sub(block * BLOCK).min(BLOCK);
            if from > 0 || to < BLOCK {
                for (j, score) in scores.iter_mut().enumerate() {
                    *score = if j >= from && j < to { *score } else { f32::NEG_INFINITY };
                }
            }
            let shrink = self.running[slot].absorb(scores);
            for held in &mut self.gathered[slot * columns..(slot + 1) * columns] {
                *held *= shrink;
            }
        }
        let weights = Rows { values: self.scores.as_flattened(), stride: BLOCK };
        let values = Rows { values: &keys.values[block * BLOCK * columns..], stride: columns };
        multiply_add(simd, weights, values, BLOCK, &mut self.gathered, columns);
    }

    #[inline(always)]
    fn finish(&self, slot: usize, output: &mut [f32]) {
        let sum = self.running[slot].sum;
        for (output, gathered) in output.iter_mut().zip(&self.gathered[slot * self.columns..]) {
            *output = gathered / sum;
        }
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
