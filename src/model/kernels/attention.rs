//! Attention over a forest of token runs, on the CPU.
//!
//! Queries go in tiles of [`TILE`] rows, keys in blocks of [`BLOCK`] that start at absolute position 0 of a path, never
//! at the offset of a node or a pack: so a query meets the same blocks in the same order wherever its sample stands and
//! however much of its prompt is shared. Softmax runs along the blocks (Milakov and Gimelshein, 1805.02867): a masked
//! key adds exactly nothing, and a block of nothing but masked keys leaves every bit as it was.

use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::distances::{Distances, HeadBias};
use super::keys::{Blocks, Form, Past};
use super::math::tanh;
use super::tile::{ROWS, Rows, Running, multiply_add};
use crate::model::pack::Pack;

/// Products of queries and keys below which a hand-over to another thread costs more than the work.
const ALONE: usize = 1 << 18;
/// Keys in a block.
pub const BLOCK: usize = 64;
/// Queries of one task, at most: long nodes are spread over threads.
const QUERIES: usize = 512;

/// Tiles that meet a block of keys one after another, while it is near.
const TILES: usize = 4;

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
/// `distances` are DeBERTa's, whose every query head has a key head of its own. The keys and values come back, too.
pub fn attend<'a>(
    shape: &Shape,
    distances: Option<Distances>,
    pack: &'a Pack,
    past: Option<Past<'a>>,
    data: &[f32],
    stride: usize,
    rows: usize,
) -> (Vec<f32>, Blocks<'a>) {
    let width = shape.heads * shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    let blocks = Blocks::gather(shape, pack, past, data, stride);
    let tasks: Vec<Task> = (0..pack.nodes().len())
        .flat_map(|node| (0..pack.nodes()[node].rows.len()).step_by(QUERIES).map(move |first| (node, first)))
        .flat_map(|(node, first)| {
            let blocks = &blocks;
            (0..shape.kv_heads).map(move |kv_head| Task { shape, distances, pack, blocks, data, stride, node, first, kv_head })
        })
        .collect();
    let run = |task: &Task| pulp::Arch::new().dispatch(*task);
    let products: usize = pack.nodes().iter().map(|node| node.rows.len() * (node.start + node.rows.len())).sum();
    let parts: Vec<Vec<f32>> =
        if products * width <= ALONE { tasks.iter().map(run).collect() } else { tasks.par_iter().map(run).collect() };
    let mut output = vec![0.0f32; rows * width];
    let columns = group * shape.head_dim;
    // The key heads of the same queries stand beside each other; nodes, and queries within them, follow one another.
    let (mut places, mut rest) = (Vec::with_capacity(tasks.len()), &mut output[..]);
    for (tasks, parts) in tasks.chunks(shape.kv_heads).zip(parts.chunks(shape.kv_heads)) {
        let (own, behind) = rest.split_at_mut(tasks[0].rows().len() * width);
        places.push((own, parts));
        rest = behind;
    }
    places.into_par_iter().for_each(|(rows, parts)| {
        for (row, output) in rows.chunks_exact_mut(width).enumerate() {
            for (output, part) in output.chunks_exact_mut(columns).zip(parts) {
                output.copy_from_slice(&part[row * columns..(row + 1) * columns]);
            }
        }
    });
    (output, blocks)
}

/// Some queries of one node, in the query heads that read one key head.
#[derive(Clone, Copy)]
struct Task<'a> {
    shape: &'a Shape,
    distances: Option<Distances<'a>>,
    pack: &'a Pack,
    blocks: &'a Blocks<'a>,
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
        let Self { shape, distances, pack, blocks, data, stride, node, first, kv_head } = self;
        let (dim, group, rows) = (shape.head_dim, shape.heads / shape.kv_heads, self.rows());
        // The position of the task's first query.
        let start = pack.nodes()[node].start + first;
        let (_, end) = visible(shape, start + rows.len() - 1, usize::MAX);
        let tokens = pack.nodes()[node].start + pack.nodes()[node].rows.len();
        let keys = Keys::new(shape, tokens.min(end), |block| blocks.head(node, block, kv_head));
        let mut bias = distances.map(|distances| distances.of_head(simd, kv_head, keys.count, |key, into| keys.copy(key, into)));
        let mut output = vec![0.0f32; rows.len() * group * dim];
        // A bias belongs to the one tile that it was turned to.
        let mut tiles = vec![Tile::new(dim, keys.columns); if bias.is_some() { 1 } else { TILES }];
        // One list of (query, head) rows: the heads of a group read the same keys, so they fill tiles together.
        let total = rows.len() * group;
        let step = tiles.len() * ROWS;
        for begin in (0..total).step_by(step) {
            let firsts = (begin..total.min(begin + step)).step_by(ROWS);
            for (first, tile) in firsts.clone().zip(&mut tiles) {
                tile.clear();
                for slot in 0..ROWS.min(total - first) {
                    let (query, head) = ((first + slot) / group, (first + slot) % group);
                    let from = (rows.start + query) * stride + (kv_head * group + head) * dim;
                    tile.query[slot * dim..(slot + 1) * dim].copy_from_slice(&data[from..from + dim]);
                    tile.sees(slot, visible(shape, start + query, keys.count));
                }
                if let Some(bias) = &mut bias {
                    bias.turn(simd, &tile.query, start + first..start + first + ROWS.min(total - first));
                }
            }
            let tiles = &mut tiles[..firsts.len()];
            let from = tiles.iter().map(|tile| tile.blocks.start).min().unwrap_or(0);
            let to = tiles.iter().map(|tile| tile.blocks.end).max().unwrap_or(0);
            for block in from..to {
                for tile in tiles.iter_mut().filter(|tile| tile.blocks.contains(&block)) {
                    tile.absorb(simd, &keys, block, shape, bias.as_ref());
                }
            }
            for (first, tile) in firsts.zip(tiles) {
                for slot in 0..ROWS.min(total - first) {
                    tile.finish(slot, &mut output[(first + slot) * dim..(first + slot + 1) * dim]);
                }
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
struct Keys<'a> {
    count: usize,
    columns: usize,
    blocks: Vec<(&'a [f32], &'a [f32])>,
}

impl<'a> Keys<'a> {
    /// Those up to a position.
    fn new(shape: &Shape, count: usize, block: impl Fn(usize) -> (&'a [f32], &'a [f32])) -> Self {
        let columns = Form::new(shape.heads, shape.kv_heads, shape.head_dim).columns;
        Self { count, columns, blocks: (0..count.div_ceil(BLOCK)).map(block).collect() }
    }

    /// The key of one position.
    fn copy(&self, position: usize, into: &mut [f32]) {
        let (block, _) = self.blocks[position / BLOCK];
        for (d, into) in into.iter_mut().enumerate() {
            *into = block[d * BLOCK + position % BLOCK];
        }
    }
}

/// A few query rows, and what they have gathered so far.
#[derive(Clone)]
struct Tile {
    dim: usize,
    columns: usize,
    /// The keys that each row sees.
    seen: [(usize, usize); ROWS],
    /// The blocks that any of them sees.
    blocks: Range<usize>,
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
        let (seen, blocks, running, scores) = ([(0, 0); ROWS], 0..0, [Running::EMPTY; ROWS], [[0.0; BLOCK]; ROWS]);
        Self { dim, columns, seen, blocks, query, running, scores, gathered }
    }

    #[inline(always)]
    fn clear(&mut self) {
        (self.seen, self.blocks) = ([(0, 0); ROWS], 0..0);
        self.query.fill(0.0);
        self.running = [Running::EMPTY; ROWS];
        self.gathered.fill(0.0);
    }

    fn sees(&mut self, slot: usize, keys: (usize, usize)) {
        self.seen[slot] = keys;
        let own = keys.0 / BLOCK..keys.1.div_ceil(BLOCK);
        let before = if self.blocks.is_empty() { own.clone() } else { self.blocks.clone() };
        self.blocks = before.start.min(own.start)..before.end.max(own.end);
    }

    /// Adds one block of keys to what every row has gathered.
    #[inline(always)]
    fn absorb<S: Simd>(&mut self, simd: S, keys: &Keys, block: usize, shape: &Shape, bias: Option<&HeadBias>) {
        let (dim, columns) = (self.dim, self.columns);
        self.scores = [[0.0; BLOCK]; ROWS];
        let queries = Rows { values: &self.query, stride: dim };
        let block_keys = Rows { values: keys.blocks[block].0, stride: BLOCK };
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
            let from = self.seen[slot].0.saturating_sub(block * BLOCK).min(BLOCK);
            let to = self.seen[slot].1.saturating_sub(block * BLOCK).min(BLOCK);
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
        let values = Rows { values: keys.blocks[block].1, stride: columns };
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
