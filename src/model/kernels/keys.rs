//! Keys and values of a forest in the form in which attention reads them: in blocks that start at absolute position 0 of a
//! path, gathered once for all queries, or kept from an earlier pack.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::ALONE;
use super::attention::{BLOCK, Shape};
use super::tile::{PANEL, WIDTH};
use crate::model::pack::{Node, Pack};

/// The keys and values of [`BLOCK`] positions of a path in one layer, for every key head in the panels that the products of
/// attention walk: the keys as `[BLOCK / PANEL, head_dim, PANEL]`, then the values as `[columns / WIDTH, BLOCK, WIDTH]`.
/// Zeros where there is no token, and where a value ends.
pub type Block = Vec<f32>;

/// The same in all layers, of tokens that an earlier pack computed.
#[derive(Debug)]
pub struct Kept {
    pub layers: Vec<Block>,
}

/// What was computed with earlier packs, as one layer sees it.
#[derive(Clone, Copy)]
pub struct Past<'a> {
    /// By node without a parent: the blocks before its first token, of which the last may count in part.
    pub blocks: &'a [Vec<Arc<Kept>>],
    pub layer: usize,
}

/// How a block is laid out.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    dim: usize,
    pub columns: usize,
    kv_heads: usize,
    /// Where the keys of a row begin, and the values.
    starts: (usize, usize),
}

impl Form {
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let starts = (heads * head_dim, (heads + kv_heads) * head_dim);
        Self { dim: head_dim, columns: head_dim.next_multiple_of(WIDTH), kv_heads, starts }
    }

    /// Where a number of a key is in a block.
    pub fn key(&self, position: usize, d: usize) -> usize {
        (position % BLOCK / PANEL * self.dim + d) * PANEL + position % PANEL
    }

    /// Numbers of one head in a block.
    fn head(&self) -> usize {
        BLOCK * (self.dim + self.columns)
    }

    /// Numbers of a block.
    pub fn size(&self) -> usize {
        self.kv_heads * self.head()
    }
}

/// The blocks of a pack in one layer.
pub struct Blocks<'a> {
    form: Form,
    pack: &'a Pack,
    past: Option<Past<'a>>,
    /// For every node where its own blocks begin: those that hold a token that it computes.
    first: Vec<usize>,
    own: Vec<Block>,
}

impl<'a> Blocks<'a> {
    /// `data` has one row a token, `stride` apart, that begins with `[queries | keys | values]`.
    pub fn gather(shape: &Shape, pack: &'a Pack, past: Option<Past<'a>>, data: &[f32], stride: usize) -> Self {
        let form = Form::new(shape.heads, shape.kv_heads, shape.head_dim);
        let (mut first, mut places) = (Vec::with_capacity(pack.nodes().len()), Vec::new());
        for (index, node) in pack.nodes().iter().enumerate() {
            first.push(places.len());
            places.extend(own(node).map(|block| (index, block)));
        }
        let fill = |&(node, block): &(usize, usize)| fill(form, pack, past, data, stride, node, block);
        let alone = places.len() * form.size() <= ALONE;
        let own = if alone { places.iter().map(fill).collect() } else { places.par_iter().map(fill).collect() };
        Self { form, pack, past, first, own }
    }

    /// Keys and values of one head in a block of a node's path.
    pub fn head(&self, mut node: usize, block: usize, head: usize) -> (&[f32], &[f32]) {
        let nodes = self.pack.nodes();
        let values = loop {
            if block >= nodes[node].start / BLOCK {
                break &self.own[self.first[node] + block - nodes[node].start / BLOCK];
            }
            match (nodes[node].parent, self.past) {
                (Some(parent), _) => node = parent,
                (None, Some(past)) => break &past.blocks[node][block].layers[past.layer],
                (None, None) => unreachable!("a path without a past begins at position 0"),
            }
        };
        values[head * self.form.head()..][..self.form.head()].split_at(BLOCK * self.form.dim)
    }

    /// Hands out a block that a node computes the last token of.
    pub fn take(&mut self, node: usize, block: usize) -> Block {
        std::mem::take(&mut self.own[self.first[node] + block - self.pack.nodes()[node].start / BLOCK])
    }
}

/// The blocks that hold a token of this node.
fn own(node: &Node) -> Range<usize> {
    if node.rows.is_empty() { 0..0 } else { node.start / BLOCK..(node.start + node.rows.len()).div_ceil(BLOCK) }
}

/// One block of a node's path, up to the node's last token.
fn fill(form: Form, pack: &Pack, past: Option<Past>, data: &[f32], stride: usize, mut node: usize, block: usize) -> Block {
    let nodes = pack.nodes();
    let mut values = vec![0.0f32; form.size()];
    let begin = block * BLOCK;
    let mut until = (nodes[node].start + nodes[node].rows.len()).min(begin + BLOCK);
    loop {
        let Node { rows, start, .. } = &nodes[node];
        let from = begin.max(*start);
        for (head, values) in values.chunks_exact_mut(form.head()).enumerate() {
            let (keys, values) = values.split_at_mut(BLOCK * form.dim);
            for position in from..until {
                let row = &data[(rows.start + position - start) * stride..];
                let key = &row[form.starts.0 + head * form.dim..][..form.dim];
                let panel = &mut keys[form.key(position, 0)..];
                for (place, key) in panel.iter_mut().step_by(PANEL).zip(key) {
                    *place = *key;
                }
                let value = &row[form.starts.1 + head * form.dim..][..form.dim];
                for (panel, value) in values.chunks_exact_mut(BLOCK * WIDTH).zip(value.chunks(WIDTH)) {
                    panel[(position - begin) * WIDTH..][..value.len()].copy_from_slice(value);
                }
            }
        }
        if from == begin {
            return values;
        }
        until = from;
        match (nodes[node].parent, past) {
            (Some(parent), _) => node = parent,
            (None, Some(past)) => {
                copy_beginning(form, &past.blocks[node][block].layers[past.layer], &mut values, until - begin);
                return values;
            }
            (None, None) => return values,
        }
    }
}

/// The first `tokens` of a block, and nothing of what stands behind them: that belongs to another sample.
fn copy_beginning(form: Form, from: &[f32], into: &mut [f32], tokens: usize) {
    for (from, into) in from.chunks_exact(form.head()).zip(into.chunks_exact_mut(form.head())) {
        let (keys, values) = into.split_at_mut(BLOCK * form.dim);
        let (from_keys, from_values) = from.split_at(BLOCK * form.dim);
        for (index, (keys, from)) in keys.chunks_exact_mut(PANEL).zip(from_keys.chunks_exact(PANEL)).enumerate() {
            let count = tokens.saturating_sub(index / form.dim * PANEL).min(PANEL);
            keys[..count].copy_from_slice(&from[..count]);
        }
        for (values, from) in values.chunks_exact_mut(BLOCK * WIDTH).zip(from_values.chunks_exact(BLOCK * WIDTH)) {
            values[..tokens * WIDTH].copy_from_slice(&from[..tokens * WIDTH]);
        }
    }
}
