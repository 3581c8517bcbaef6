//! Encodings that are run in one forward pass: a forest of token runs, never a rectangle. Pure.

use std::ops::Range;
use std::sync::Arc;

use crate::text::Encoding;

/// The fewest rows that a matrix product is given. Crate gemm computes a row of a product of fewer rows in another order
/// of additions, and then a score would depend on its company.
pub const MIN_ROWS: usize = 4;

/// Token runs packed end to end. Every row of the pack is one token; no row is padding, but for the few that lift a very
/// short pack to [`MIN_ROWS`], which belong to no node and which nobody reads.
#[derive(Clone, Debug)]
pub struct Pack {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    positions: Vec<u32>,
    nodes: Vec<Node>,
    samples: Vec<Slot>,
    longest: usize,
}

/// A run of tokens that is computed once. Its queries see the keys of its path: its ancestors' rows and its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub rows: Range<usize>,
    pub parent: Option<usize>,
    /// Position of the node's first token in every sample that runs through it.
    pub start: usize,
}

#[derive(Clone, Debug)]
struct Slot {
    encoding: Arc<Encoding>,
    leaf: usize,
    shared: usize,
}

impl Pack {
    /// Packs samples end to end, in order; the outputs of a forward come back in the same order.
    pub fn new(samples: &[Arc<Encoding>]) -> Self {
        let tokens: usize = samples.iter().map(|sample| sample.tokens()).sum();
        let rows = tokens.max(MIN_ROWS);
        let mut pack = Self {
            ids: Vec::with_capacity(rows),
            type_ids: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            nodes: Vec::with_capacity(samples.len()),
            samples: Vec::with_capacity(samples.len()),
            longest: 0,
        };
        for sample in samples {
            let first = pack.ids.len();
            pack.ids.extend_from_slice(sample.ids());
            match sample.type_ids() {
                Some(types) => pack.type_ids.extend_from_slice(types),
                None => pack.type_ids.resize(pack.ids.len(), 0),
            }
            pack.positions.extend(0..sample.tokens() as u32);
            pack.longest = pack.longest.max(sample.tokens());
            pack.samples.push(Slot { encoding: Arc::clone(sample), leaf: pack.nodes.len(), shared: 0 });
            pack.nodes.push(Node { rows: first..pack.ids.len(), parent: None, start: 0 });
        }
        pack.ids.resize(rows, 0);
        pack.type_ids.resize(rows, 0);
        pack.positions.resize(rows, 0);
        pack
    }

    /// Token ids, one a row.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Segment numbers, one a row.
    pub fn type_ids(&self) -> &[u32] {
        &self.type_ids
    }

    /// Positions within the sample, one a row.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Tokens of the longest sample.
    pub fn longest(&self) -> usize {
        self.longest
    }

    pub fn encoding(&self, sample: usize) -> &Encoding {
        &self.samples[sample].encoding
    }

    /// Tokens of this sample that were computed for it and another sample at once.
    pub fn shared_tokens(&self, sample: usize) -> usize {
        self.samples[sample].shared
    }

    /// The node in which a sample ends.
    pub fn leaf(&self, sample: usize) -> usize {
        self.samples[sample].leaf
    }

    /// The row ranges that a node's queries see, from the root to the node itself.
    pub fn path(&self, node: usize) -> Vec<Range<usize>> {
        let mut path = Vec::new();
        let mut next = Some(node);
        while let Some(node) = next {
            path.push(self.nodes[node].rows.clone());
            next = self.nodes[node].parent;
        }
        path.reverse();
        path
    }

    /// The row of one token of a sample. `position` must be below the sample's length.
    pub fn row(&self, sample: usize, position: usize) -> usize {
        let mut node = &self.nodes[self.samples[sample].leaf];
        while position < node.start
            && let Some(parent) = node.parent
        {
            node = &self.nodes[parent];
        }
        node.rows.start + position - node.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pack(samples: &[Vec<u32>]) -> Pack {
        let encodings: Vec<_> = samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.clone()))).collect();
        Pack::new(&encodings)
    }

    #[test]
    fn a_very_short_pack_is_lifted_to_the_fewest_rows_that_nobody_reads() {
        let pack = pack(&[vec![7]]);
        assert_eq!(pack.ids(), [7, 0, 0, 0]);
        assert_eq!(pack.nodes(), [Node { rows: 0..1, parent: None, start: 0 }]);
    }

    proptest! {
        #[test]
        fn every_token_of_every_sample_has_its_row_and_no_row_is_padding(samples in prop::collection::vec(prop::collection::vec(0u32..9, 1..12), 1..8)) {
            let pack = pack(&samples);
            let tokens: usize = samples.iter().map(Vec::len).sum();
            prop_assert_eq!(pack.ids().len(), tokens.max(MIN_ROWS));
            let mut seen = vec![false; pack.ids().len()];
            for (sample, ids) in samples.iter().enumerate() {
                for (position, id) in ids.iter().enumerate() {
                    let row = pack.row(sample, position);
                    prop_assert_eq!(pack.ids()[row], *id);
                    prop_assert_eq!(pack.positions()[row] as usize, position);
                    prop_assert!(!std::mem::replace(&mut seen[row], true));
                }
            }
            prop_assert!(seen[..tokens].iter().all(|seen| *seen));
        }
    }
}
