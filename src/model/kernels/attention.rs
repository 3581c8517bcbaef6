//! Attention over a forest of token runs, on the CPU.
//!
//! Queries go in tiles of [`ROWS`], keys in blocks of [`BLOCK`] that start at absolute position 0 of a path, never at the
//! offset of a node or a pack: so a query meets the same blocks in the same order wherever its sample stands and however
//! much of its prompt is shared. Softmax runs along the blocks (Milakov and Gimelshein, 1805.02867): a masked key adds
//! exactly nothing, so of a block only the panels are walked of which some query of the tile sees a key.

use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::distances::{Distances, HeadBias};
use super::keys::{Blocks, Form, Past};
use super::math::tanh;
use super::tile::{PANEL, ROWS, Running, WIDTH, Weights, fill_lane, gather, products};
use crate::model::pack::Pack;

/// Products of queries and keys below which a hand-over to another thread costs more than the work.
const ALONE: usize = 1 << 18;
/// Keys in a block.
pub const BLOCK: usize = 64;
/// Queries of one task, at most: long nodes are spread over threads.
const QUERIES: usize = 512;

/// Tiles that meet a block of keys one after another, while it is near.
const TILES: usize = 2;

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
        let mut tiles = vec![Tile::new(dim, keys.form.columns); if bias.is_some() { 1 } else { TILES }];
        // One list of (query, head) rows: the heads of a group read the same keys, so they fill tiles together.
        let total = rows.len() * group;
        let step = tiles.len() * ROWS;
        for begin in (0..total).step_by(step) {
            let firsts = (begin..total.min(begin + step)).step_by(ROWS);
            for (first, tile) in firsts.clone().zip(&mut tiles) {
                tile.clear();
                for row in first..total.min(first + ROWS) {
                    let (query, head) = (row / group, row % group);
                    let from = (rows.start + query) * stride + (kv_head * group + head) * dim;
                    tile.push(&data[from..from + dim], visible(shape, start + query, keys.count));
                }
                if let Some(bias) = &mut bias {
                    bias.turn(simd, &tile.queries, start + first..start + first + tile.count);
                }
            }
            let tiles = &mut tiles[..firsts.len()];
            let from = tiles.iter().map(|tile| tile.seen.start / BLOCK).min().unwrap_or(0);
            let to = tiles.iter().map(|tile| tile.seen.end.div_ceil(BLOCK)).max().unwrap_or(0);
            for block in from..to {
                for tile in tiles.iter_mut() {
                    tile.absorb(simd, &keys, block, shape, bias.as_ref());
                }
            }
            for (first, tile) in firsts.zip(tiles) {
                tile.finish(&mut output[first * dim..][..tile.count * dim]);
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

/// The keys and values of a path, up to a position.
struct Keys<'a> {
    count: usize,
    form: Form,
    blocks: Vec<(&'a [f32], &'a [f32])>,
}

impl<'a> Keys<'a> {
    fn new(shape: &Shape, count: usize, block: impl Fn(usize) -> (&'a [f32], &'a [f32])) -> Self {
        let form = Form::new(shape.heads, shape.kv_heads, shape.head_dim);
        Self { count, form, blocks: (0..count.div_ceil(BLOCK)).map(block).collect() }
    }

    /// The key of one position.
    fn copy(&self, position: usize, into: &mut [f32]) {
        let (keys, _) = self.blocks[position / BLOCK];
        for (d, into) in into.iter_mut().enumerate() {
            *into = keys[self.form.key(position, d)];
        }
    }
}

/// Some queries, and what they have gathered so far.
#[derive(Clone)]
struct Tile {
    dim: usize,
    count: usize,
    /// The keys that each query sees, from one position up to another.
    from: [usize; ROWS],
    to: [usize; ROWS],
    /// A range that holds the keys that any of them sees, and those that all of them see.
    seen: Range<usize>,
    common: Range<usize>,
    /// `[dim, ROWS]`.
    queries: Vec<f32>,
    running: Running,
    /// Scores of some keys of one block, and then their weights.
    scores: [[f32; ROWS]; BLOCK],
    /// The weighted sum of the values, relative to the largest score: `[columns / WIDTH, ROWS, WIDTH]`.
    gathered: Vec<f32>,
}

impl Tile {
    fn new(dim: usize, columns: usize) -> Self {
        let (queries, gathered, scores) = (vec![0.0; dim * ROWS], vec![0.0; columns * ROWS], [[0.0; ROWS]; BLOCK]);
        let (from, to, running) = ([0; ROWS], [0; ROWS], Running::EMPTY);
        Self { dim, count: 0, from, to, seen: 0..0, common: 0..0, queries, running, scores, gathered }
    }

    #[inline(always)]
    fn clear(&mut self) {
        (self.count, self.from, self.to, self.running) = (0, [0; ROWS], [0; ROWS], Running::EMPTY);
        (self.seen, self.common) = (0..0, 0..usize::MAX);
        self.gathered.fill(0.0);
    }

    /// Takes one query more, and the keys that it sees.
    #[inline(always)]
    fn push(&mut self, query: &[f32], (from, to): (usize, usize)) {
        fill_lane(&mut self.queries, self.count, query);
        (self.from[self.count], self.to[self.count]) = (from, to);
        self.seen = if self.count == 0 { from..to } else { self.seen.start.min(from)..self.seen.end.max(to) };
        self.common = self.common.start.max(from)..self.common.end.min(to);
        self.count += 1;
    }

    /// Adds one block of keys to what every query has gathered.
    #[inline(always)]
    fn absorb<S: Simd>(&mut self, simd: S, keys: &Keys, block: usize, shape: &Shape, bias: Option<&HeadBias>) {
        let first = block * BLOCK;
        let from = self.seen.start.saturating_sub(first).min(BLOCK) / PANEL * PANEL;
        let to = self.seen.end.saturating_sub(first).min(BLOCK).next_multiple_of(PANEL);
        if from >= to {
            return;
        }
        let (block_keys, values) = keys.blocks[block];
        let scores = &mut self.scores[from..to];
        products(simd, &block_keys[from * self.dim..to * self.dim], &self.queries, self.count, scores.as_flattened_mut());
        if let Some(bias) = bias {
            bias.add(first + from, scores);
        }
        for score in scores.as_flattened_mut() {
            *score *= shape.scale;
        }
        if let Some(cap) = shape.softcap {
            for score in scores.as_flattened_mut() {
                *score = cap * tanh(*score / cap);
            }
        }
        if self.common.start > first + from || self.common.end < first + to {
            mask(first + from, &self.from, &self.to, scores);
        }
        let shrink = self.running.absorb(scores);
        let weights = Weights { all: &self.scores, keys: from..to, shrink: &shrink, count: self.count };
        gather(simd, weights, values, &mut self.gathered);
    }

    /// What every query has gathered, as `[count, dim]`.
    #[inline(always)]
    fn finish(&self, output: &mut [f32]) {
        for (lane, output) in output.chunks_exact_mut(self.dim).enumerate() {
            for (output, panel) in output.chunks_mut(WIDTH).zip(self.gathered.chunks_exact(ROWS * WIDTH)) {
                for (output, gathered) in output.iter_mut().zip(&panel[lane * WIDTH..]) {
                    *output = gathered / self.running.sums[lane];
                }
            }
        }
    }
}

/// Hides the keys that a query does not see; the scores are those of keys from position `first` on.
#[inline(always)]
fn mask(first: usize, from: &[usize; ROWS], to: &[usize; ROWS], scores: &mut [[f32; ROWS]]) {
    // In 32 bits, so that a comparison takes no more room than what it decides on.
    let near = |bounds: &[usize; ROWS]| bounds.map(|bound| bound.saturating_sub(first).min(BLOCK) as u32);
    let (from, to) = (near(from), near(to));
    for (key, scores) in (0u32..).zip(scores) {
        for i in 0..ROWS {
            scores[i] = if key >= from[i] && key < to[i] { scores[i] } else { f32::NEG_INFINITY };
        }
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
