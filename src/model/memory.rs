//! What a forward pass holds on its device beside the weights: an upper bound from the architecture alone, before anything
//! is loaded. Pure.
//!
//! It follows the forward pass (`transformer.rs`, `plain/attention.rs`): which tensors of a layer live at the same time, and
//! how large each of them is at most. Layers come one after another, so one layer's counts.

use serde::Serialize;

use super::device::{Arithmetic, FIXED_ROWS, Place, Tiling};
use super::pack::MIN_ROWS;
use super::plain::ELEMENTS;
use super::transformer::ROW_BLOCK;
use crate::checkpoint::{Architecture, Dtype};

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Our kernels, on the CPU, in float32.
    Kernels,
    /// Operations of candle.
    Plain,
    /// The same with flash attention.
    Flash,
}

impl Way {
    pub fn words(self) -> &'static str {
        match self {
            Self::Kernels => "own kernels",
            Self::Plain => "plain attention",
            Self::Flash => "flash attention",
        }
    }
}

/// What one pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Tokens that are computed.
    pub tokens: usize,
    /// Tokens of the longest sample.
    pub longest: usize,
    pub samples: usize,
}

impl Load {
    /// The most that a pack of so many tokens can hold of samples that are not longer than this.
    pub fn of(tokens: usize, max_tokens: usize) -> Self {
        Self { tokens, longest: max_tokens.min(tokens), samples: tokens.min(MOST_SAMPLES) }
    }
}

/// Samples of one pack, at most, by the scorer's defaults.
const MOST_SAMPLES: usize = 1024;
/// Distinct nodes for every sample, at most: each one splits at most one other.
const NODES_A_SAMPLE: usize = 2;
/// The flash kernels get the keys of every sample's whole path: of a group of 16 behind a prompt that is four times as long
/// as a completion, four times as many as there are rows.
const GATHERED: u64 = 4;
/// Of the libraries: what products are split over, and their packed operands.
const WORKSPACE: u64 = 64 << 20;

/// Packs are measured in steps of so many tokens.
const STEP: usize = 256;

/// Bytes that must be free beside the weights on each of these devices, of one kind, if a model is to be of any use there: what
/// a forward over the smallest pack takes.
pub fn least_activation_bytes(places: &[Place], arithmetic: Arithmetic, architecture: &Architecture, max_tokens: usize) -> u64 {
    let Some(place) = places.first() else { return 0 };
    let (way, Arithmetic { dtype, batch_invariant }) = (place.way(arithmetic, architecture), arithmetic);
    activation_bytes(architecture, way, dtype, batch_invariant, Load::of(STEP, max_tokens))
}

/// The largest pack, up to `most` tokens, for which `bytes`, which never falls with the tokens, are at most `room`; the
/// smallest step where none is.
pub fn fitting_pack(room: u64, most: usize, bytes: impl Fn(usize) -> u64) -> usize {
    let (mut fits, mut beyond) = (1, most / STEP + 1);
    while beyond > fits + 1 {
        let middle = fits.midpoint(beyond);
        if bytes(middle * STEP) <= room { fits = middle } else { beyond = middle }
    }
    (fits * STEP).min(most.max(1))
}

/// Bytes that a forward over such a pack holds at once beside the weights.
pub fn activation_bytes(architecture: &Architecture, way: Way, weights: Dtype, fixed_shapes: bool, load: Load) -> u64 {
    let a = architecture;
    let wide = |count: usize| count as u64;
    let (f32s, w) = (4, if way == Way::Kernels { 4 } else { wide(weights.size()) });
    let fixed = fixed_shapes && way != Way::Kernels;
    let rows = wide(load.tokens.max(MIN_ROWS));
    // Rows of a product, and how many copies of its output there are while blocks become one.
    let (product_rows, copies) = if fixed { (rows.next_multiple_of(wide(FIXED_ROWS)), 2) } else { (rows, 1) };
    let (h, queries, keys) = (wide(a.hidden_size), wide(a.heads * a.head_dim), wide(a.kv_heads * a.head_dim));
    let up = wide(a.intermediate_size) * if a.gated { 2 } else { 1 };
    let inner = wide(a.intermediate_size);
    let stream = rows * h * f32s;
    let row = |columns: u64, size: u64| rows * columns * size;
    let cast = |columns: u64| if w < f32s { rows * columns * w } else { 0 };
    // An output, with its bias added into a tensor of its own.
    let product = |columns: u64, biased: bool| {
        let with_bias = if biased && way != Way::Kernels { rows * columns * w } else { 0 };
        product_rows * columns.max(80) * w * copies + with_bias
    };
    let joined = if way == Way::Kernels { 0 } else { stream + cast(h) + stream };

    let qkv = queries + 2 * keys;
    let projected = row(h, f32s) + cast(h) + product(qkv, a.qkv_bias);
    let attention = product(qkv, false) / copies + attended(a, way, w, fixed, load);
    let convolution = a.convolution.as_ref().map_or(0, |convolution| 2 * row(h * wide(convolution.kernel), f32s) + product(h, true));
    let behind = if way == Way::Kernels && a.experts.is_none() {
        // In blocks of rows, beside the stream and what attention gave.
        let block = wide(load.tokens.clamp(MIN_ROWS, ROW_BLOCK)) * f32s;
        row(queries, f32s) + block * (3 * h + queries + up.max(80) + inner + 2 * h.max(80))
    } else {
        let output = row(queries, f32s) + cast(queries) + product(h, a.output_bias) + joined;
        let activated = if way == Way::Kernels { row(inner, w) } else { row(inner, w) + row(inner, f32s) + cast(inner) };
        let mlp = |up: u64, activated: u64| row(h, f32s) + cast(h) + product(up, a.mlp_bias) + activated + product(h, a.mlp_bias) + joined;
        let dense = mlp(up, activated);
        let experts = a.experts.as_ref().map_or(0, |experts| {
            // As if every token had chosen the same expert.
            let inner = wide(experts.intermediate_size);
            // Every row once for each of its experts, where all of them are gathered at once, and what comes of it twice.
            let copies = if way == Way::Kernels { 1 } else { wide(experts.per_token) };
            let gathered = (1 + copies) * stream + 2 * copies * row(h, w) + row(wide(experts.count), f32s);
            let one = mlp(2 * inner, row(inner, w) + row(inner, f32s) + cast(inner));
            let alone = gathered + one.max((copies + 2) * stream) + stream;
            if way == Way::Kernels { alone } else { alone.max(tiled(a, w, fixed, rows)) }
        });
        // In families of parallel parts the MLP stands beside what attention gave.
        output.max(dense.max(experts) + row(queries, f32s) + row(h, w))
    };
    let largest = projected.max(attention).max(behind).max(convolution);
    // That of the next pack stands there, too.
    let whole_pack = if way == Way::Kernels { 0 } else { 2 * planned(a, way, fixed, load) };
    2 * stream + whole_pack + convolution + largest + WORKSPACE
}

/// What a mixture takes whose rows stand in tiles: what goes into the first product and what stands behind it, or what came out
/// and how it is added up.
fn tiled(a: &Architecture, w: u64, fixed: bool, rows: u64) -> u64 {
    let Some(experts) = &a.experts else { return 0 };
    let (h, inner, count) = (a.hidden_size as u64, experts.intermediate_size as u64, experts.count as u64);
    let (f32s, pairs) = (4, rows * experts.per_token.min(experts.count) as u64);
    let places = Tiling::most_places(pairs, count, fixed.then_some(FIXED_ROWS as u64));
    let products = places * (h * f32s + 2 * inner * w + (h * w).max(inner * (3 * w + f32s)));
    let sums = places * h * w + pairs * h * (2 * f32s + w) + 2 * rows * h * f32s;
    // Beside the rows themselves, and what they were chosen by.
    products.max(sums) + rows * h * f32s + 3 * rows * count * f32s
}

/// What stands on the device for the whole of a forward: angles, masks, indices.
fn planned(a: &Architecture, way: Way, fixed: bool, load: Load) -> u64 {
    let rows = load.tokens.max(MIN_ROWS) as u64;
    let angles: u64 = a.ropes.iter().map(|rope| 2 * 4 * (rope.dims as u64 / 2) * (rows + 2 * load.longest as u64)).sum();
    let mut windows: Vec<Option<usize>> = a.layers.iter().map(|layer| layer.window).collect();
    windows.sort_unstable();
    windows.dedup();
    let masks = match way {
        Way::Flash => 0,
        _ => {
            // A mask, and where distances count their numbers both ways, for every query and key that meet.
            let bytes = if a.disentangled.is_some() { 12 } else { 4 };
            windows.iter().map(|_| bytes * lifted_queries(load, fixed) * lifted(load.longest, fixed)).sum()
        }
    };
    angles + masks + 16 * rows * windows.len() as u64
}

/// Everything between the projections and the output layer.
fn attended(a: &Architecture, way: Way, w: u64, fixed: bool, load: Load) -> u64 {
    let rows = load.tokens.max(MIN_ROWS) as u64;
    let (queries, keys) = ((a.heads * a.head_dim) as u64, (a.kv_heads * a.head_dim) as u64);
    if way == Way::Kernels {
        return rows * queries * 4;
    }
    // One part after another is taken out, normed, rotated and rounded.
    let size = if way == Way::Flash { w } else { 4 };
    let parts = rows * (queries + 2 * keys) * size + 3 * rows * queries * 4;
    if way == Way::Flash {
        return parts + GATHERED * rows * 2 * keys * w + 3 * rows * queries * w;
    }
    // Of one batch: its queries twice, keys, values and a copy of one of them, and three of its scores.
    let lifted_rows = lifted_queries(load, fixed);
    let alone = (a.heads * 64).max(a.kv_heads * a.head_dim) as u64 * lifted(load.longest, fixed);
    let most = (ELEMENTS as u64).max(alone);
    // In fixed shapes a batch has eight tasks of 64 queries; else it may have all there are.
    let (met_queries, met_tasks) = if fixed { (8 * 64, 8) } else { (lifted_rows, tasks(a, load)) };
    let scores = (a.heads as u64 * met_queries * lifted(load.longest, fixed)).min(most) * 3 * 4;
    let gathered = met_queries * queries * 4 * 2 + (met_tasks * lifted(load.longest, fixed) * keys).min(most) * 3 * 4;
    let distances = a.disentangled.as_ref().map_or(0, |disentangled| {
        // Every query meets every embedding of a distance, and so does every key of every task; what belongs to a pair is
        // picked out of that by its index.
        let embeddings = 2 * disentangled.span as u64 * a.heads as u64;
        let met = (met_queries + met_tasks * lifted(load.longest, fixed)) * embeddings;
        met * 4 + scores
    });
    // The outputs of all batches, the same as one, and in the order of the rows.
    let outputs = 2 * lifted_rows * queries * 4 + rows * queries * 4;
    parts + scores + distances + gathered + outputs
}

/// A size of a batch is at most a quarter more than that of any of its tasks, or 16 more for the smallest; in fixed shapes
/// keys end with those of a whole task of queries.
fn lifted(count: usize, fixed: bool) -> u64 {
    (count + count / 4 + if fixed { 80 } else { 16 }) as u64
}

/// Of all queries: each node may be lifted, and in fixed shapes every product of some number of tasks.
fn lifted_queries(load: Load, fixed: bool) -> u64 {
    let nodes = load.tokens.min(NODES_A_SAMPLE * load.samples);
    let lifted = load.tokens + load.tokens / 4 + 16 * nodes + 64;
    // A node may begin and end within a task of 64 queries, and for each of the sizes that keys are lifted to the last
    // product may hold one task of eight.
    let sizes = 4 * (load.longest.max(1).ilog2() as usize + 1);
    (if fixed { lifted + 128 * nodes + sizes * 8 * 64 } else { lifted }) as u64
}

/// Runs of queries that gather their keys, of the whole pack.
fn tasks(a: &Architecture, load: Load) -> u64 {
    let nodes = load.tokens.min(NODES_A_SAMPLE * load.samples) as u64;
    let step = (ELEMENTS / (a.heads * load.longest).max(1)).clamp(16, 512);
    nodes + (load.tokens / step) as u64
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
