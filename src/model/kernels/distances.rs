//! What disentangled attention (DeBERTa, 2006.03654) adds to the products of queries and keys: products of queries with
//! embeddings of the distance to the key, and of keys with embeddings of the distance from the query.

use std::ops::Range;

use pulp::Simd;

use super::attention::BLOCK;
use super::tile::{PANEL, ROWS, fill_lane, products};
use crate::checkpoint::Disentangled;

/// Embeddings of distances, projected by one layer.
#[derive(Clone, Debug)]
pub struct Projected {
    head_dim: usize,
    /// Embeddings, and zeros up to whole panels.
    width: usize,
    /// As keys, which queries meet: `[heads, width / PANEL, head_dim, PANEL]`.
    keys: Option<Vec<f32>>,
    /// As queries, which keys meet, in the same order.
    queries: Option<Vec<f32>>,
}

/// [`Projected`], and the embedding of every distance in a pack.
#[derive(Clone, Copy, Debug)]
pub struct Distances<'a> {
    pub projected: &'a Projected,
    /// By the distance from a query forwards to a key, plus `longest - 1`; with a block of entries behind that are never
    /// counted.
    pub embeddings: &'a [u16],
    /// Tokens of the longest sample.
    pub longest: usize,
}

impl Projected {
    /// `keys` and `queries` are `[embeddings, heads * head_dim]`.
    pub fn new(heads: usize, head_dim: usize, embeddings: usize, keys: Option<&[f32]>, queries: Option<&[f32]>) -> Self {
        let width = embeddings.next_multiple_of(PANEL);
        let panels = |values: &[f32]| {
            let mut panels = vec![0.0; heads * width * head_dim];
            for (row, values) in values.chunks_exact(heads * head_dim).enumerate() {
                for (column, value) in values.iter().enumerate() {
                    let (head, d) = (column / head_dim, column % head_dim);
                    let panel = (head * width + row / PANEL * PANEL) * head_dim;
                    panels[panel + d * PANEL + row % PANEL] = *value;
                }
            }
            panels
        };
        Self { head_dim, width, keys: keys.map(panels), queries: queries.map(panels) }
    }

    /// Products of a tile of rows, `[head_dim, ROWS]`, with the embeddings of a range, into `[width, ROWS]`. Those around
    /// them are computed or not, by whole panels, and never read.
    #[inline(always)]
    fn meet<S: Simd>(&self, simd: S, embeddings: &[f32], head: usize, tile: &[f32], range: Range<usize>, into: &mut [f32]) {
        let range = range.start / PANEL * PANEL..range.end.next_multiple_of(PANEL);
        let own = &embeddings[head * self.width * self.head_dim..][..self.width * self.head_dim];
        let embeddings = &own[range.start * self.head_dim..range.end * self.head_dim];
        products(simd, embeddings, tile, ROWS, &mut into[range.start * ROWS..range.end * ROWS]);
    }
}

impl<'a> Distances<'a> {
    /// The embeddings of the distances from some queries to some keys, as a range that holds them all.
    fn range(&self, queries: Range<usize>, keys: Range<usize>) -> Range<usize> {
        let at = |query: usize, key: usize| usize::from(self.embeddings[key + self.longest - 1 - query]);
        // Embeddings are in the order of their distances.
        let (one, other) = (at(queries.start, keys.end - 1), at(queries.end - 1, keys.start));
        one.min(other)..one.max(other) + 1
    }

    /// The bias of one head on one sample of so many tokens; `key` gives the key of a position.
    #[inline(always)]
    pub fn of_head<S: Simd>(self, simd: S, head: usize, tokens: usize, key: impl Fn(usize, &mut [f32])) -> HeadBias<'a> {
        let (projected, dim) = (self.projected, self.projected.head_dim);
        let size = projected.width * ROWS;
        let mut from_keys = Vec::new();
        if let Some(embeddings) = &projected.queries {
            from_keys = vec![0.0; tokens.next_multiple_of(BLOCK).div_ceil(ROWS) * size];
            let (mut row, mut tile) = (vec![0.0; dim], vec![0.0; dim * ROWS]);
            for (first, into) in (0..tokens).step_by(ROWS).zip(from_keys.chunks_exact_mut(size)) {
                let keys = first..tokens.min(first + ROWS);
                for (slot, position) in keys.clone().enumerate() {
                    key(position, &mut row);
                    fill_lane(&mut tile, slot, &row);
                }
                projected.meet(simd, embeddings, head, &tile, self.range(0..tokens, keys), into);
            }
        }
        HeadBias { distances: self, head, tokens, queries: 0..0, from_keys, from_queries: vec![0.0; size] }
    }
}

/// The bias of one head on one sample.
pub struct HeadBias<'a> {
    distances: Distances<'a>,
    head: usize,
    tokens: usize,
    /// Positions of the tile at hand.
    queries: Range<usize>,
    /// `[tokens / ROWS, width, ROWS]`.
    from_keys: Vec<f32>,
    /// `[width, ROWS]`, of the tile at hand.
    from_queries: Vec<f32>,
}

impl HeadBias<'_> {
    /// Turns to the tile, `[head_dim, ROWS]`, of the queries at these positions.
    #[inline(always)]
    pub fn turn<S: Simd>(&mut self, simd: S, tile: &[f32], queries: Range<usize>) {
        let projected = self.distances.projected;
        if let Some(embeddings) = &projected.keys {
            let range = self.distances.range(queries.clone(), 0..self.tokens);
            projected.meet(simd, embeddings, self.head, tile, range, &mut self.from_queries);
        }
        self.queries = queries;
    }

    /// Adds to the products of the tile with the keys at positions from `first` on.
    #[inline(always)]
    pub fn add(&self, first: usize, products: &mut [[f32; ROWS]]) {
        let Distances { projected, embeddings, longest } = self.distances;
        let (from_queries, _) = self.from_queries.as_chunks::<ROWS>();
        let (from_keys, _) = self.from_keys.as_chunks::<ROWS>();
        for (key, products) in (first..).zip(products) {
            // The distances from the queries of the tile to this key, of which the last query's comes first.
            let embeddings = &embeddings[key + longest - self.queries.end..][..self.queries.len()];
            if projected.keys.is_some() {
                for ((slot, product), embedding) in products.iter_mut().enumerate().zip(embeddings.iter().rev()) {
                    *product += from_queries[usize::from(*embedding)][slot];
                }
            }
            if projected.queries.is_some() {
                let from_keys = &from_keys[key / ROWS * projected.width..][..projected.width];
                for (product, embedding) in products.iter_mut().zip(embeddings.iter().rev()) {
                    *product += from_keys[usize::from(*embedding)][key % ROWS];
                }
            }
        }
    }
}

/// The embedding of every distance between two tokens of a sequence of up to `longest`, as [`Distances::embeddings`] has them.
pub fn embeddings(disentangled: &Disentangled, longest: usize) -> Vec<u16> {
    let span = disentangled.span as i64;
    let distances = 1 - longest as i64..longest as i64;
    // transformers counts from the key backwards to the query.
    let embedding = |distance: i64| (bucket(disentangled, -distance) + span).clamp(0, 2 * span - 1) as u16;
    distances.map(embedding).chain(std::iter::repeat_n(0, BLOCK)).collect()
}

/// `make_log_bucket_position`: near distances are their own bucket, far ones share logarithmic ones.
fn bucket(disentangled: &Disentangled, distance: i64) -> i64 {
    let Some(most) = disentangled.buckets_to else { return distance };
    let middle = (disentangled.span / 2) as f32;
    let magnitude = distance.abs() as f32;
    if magnitude <= middle {
        return distance;
    }
    // In float32, as there: whether a distance falls on one side of a boundary or the other is decided by rounding.
    let log = |x: f32| libm::log(f64::from(x)) as f32;
    let far = (log(magnitude / middle) / log(((most as f64 - 1.0) / f64::from(middle)) as f32) * (middle - 1.0)).ceil() + middle;
    far as i64 * distance.signum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disentangled(span: usize, buckets_to: Option<usize>) -> Disentangled {
        Disentangled { span, buckets_to, content_to_position: true, position_to_content: true, shared_projections: true, norm: false }
    }

    #[test]
    fn near_distances_are_their_own_and_far_ones_share_buckets() {
        // What transformers' make_log_bucket_position gives for 256 buckets up to 512, and 8 up to 40.
        let large = disentangled(256, Some(512));
        assert_eq!(
            [0, 1, 127, 128, 129, 130, 200, 300, 511].map(|distance| bucket(&large, distance)),
            [0, 1, 127, 128, 129, 130, 169, 207, 255]
        );
        let small = disentangled(8, Some(40));
        assert_eq!([3, 4, 5, 8, 9, 16, 39, 40, 150].map(|distance| bucket(&small, distance)), [3, 4, 5, 5, 6, 6, 7, 8, 9]);
        assert_eq!(bucket(&large, -300), -bucket(&large, 300));
        let rows = embeddings(&disentangled(4, None), 7);
        assert_eq!(rows[..13], [7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]);
    }
}
