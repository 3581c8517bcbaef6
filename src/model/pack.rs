//! Encodings that are run in one forward pass: a forest of token runs, never a rectangle. Pure.

use std::ops::Range;
use std::sync::Arc;

use super::ready::Ready;
pub use super::trie::{MIN_SHARED, PrefixKey};
use super::trie::{Run, Trie};
use crate::text::Encoding;

/// The fewest rows that a matrix product is given. Crate gemm computes a row of a product of fewer rows in another order
/// of additions, and then a score would depend on its company.
pub const MIN_ROWS: usize = 4;

/// Token runs packed end to end. Every row of the pack is one token; no row is padding, but for the few that lift a very
/// short pack to `MIN_ROWS`, which belong to no node and which nobody reads.
#[derive(Clone, Debug)]
pub struct Pack {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    positions: Vec<u32>,
    nodes: Vec<Node>,
    samples: Vec<Slot>,
    longest: usize,
    /// For a forward over it.
    ready: Ready,
}

/// A run of tokens that is computed once. Its queries see the keys of its path: its ancestors' rows and its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub rows: Range<usize>,
    /// What comes before it; `None` where that is nothing, or was computed with an earlier pack.
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
    /// Packs samples end to end, in order, each computed for itself; the outputs of a forward come back in the same order.
    pub fn new(samples: &[Arc<Encoding>]) -> Self {
        Self::forest(samples, |_| None)
    }

    /// Packs samples so that what they begin with in common is computed once, and equal samples are computed once as a
    /// whole; the outputs of a forward come back in the order of `samples`. Only samples of the same key, which depends on
    /// the length alone, share anything; those without a key never do (see [`super::RewardModel::prefix_key`]).
    pub fn forest(samples: &[Arc<Encoding>], key: impl Fn(usize) -> Option<PrefixKey>) -> Self {
        let trie = Trie::grow(samples, key);
        let rows = trie.tokens().max(MIN_ROWS);
        let mut pack = Self {
            ids: Vec::with_capacity(rows),
            type_ids: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            nodes: Vec::with_capacity(trie.runs().len()),
            samples: Vec::with_capacity(samples.len()),
            longest: samples.iter().map(|sample| sample.tokens()).max().unwrap_or(0),
            ready: Ready::default(),
        };
        // A run is made before those that follow on it, but for the two halves of one that was cut; parents come first here.
        let mut node_of = vec![usize::MAX; trie.runs().len()];
        for run in trie.parents_first() {
            let Run { parent, start, sample, end, .. } = trie.runs()[run];
            let (encoding, first) = (&samples[sample], pack.ids.len());
            pack.ids.extend_from_slice(&encoding.ids()[start..end]);
            match encoding.type_ids() {
                Some(types) => pack.type_ids.extend_from_slice(&types[start..end]),
                None => pack.type_ids.resize(pack.ids.len(), 0),
            }
            pack.positions.extend(start as u32..end as u32);
            node_of[run] = pack.nodes.len();
            pack.nodes.push(Node { rows: first..pack.ids.len(), parent: parent.map(|parent| node_of[parent]), start });
        }
        for (sample, encoding) in samples.iter().enumerate() {
            let leaf = trie.leaf(sample);
            pack.samples.push(Slot { encoding: Arc::clone(encoding), leaf: node_of[leaf], shared: trie.shared(leaf) });
        }
        pack.lift();
        pack
    }

    /// The same nodes, without so many of the first tokens of each as there are in `there`, which need not be computed. A
    /// node may lack some only if its parent lacks all, and every sample keeps at least its last token.
    pub fn without(&self, there: &[usize]) -> Self {
        let (samples, longest, ready) = (self.samples.clone(), self.longest, Ready::default());
        let mut rest = Self { ids: Vec::new(), type_ids: Vec::new(), positions: Vec::new(), nodes: Vec::new(), samples, longest, ready };
        for (node, there) in self.nodes.iter().zip(there) {
            let (first, rows) = (rest.ids.len(), node.rows.start + there..node.rows.end);
            rest.ids.extend_from_slice(&self.ids[rows.clone()]);
            rest.type_ids.extend_from_slice(&self.type_ids[rows.clone()]);
            rest.positions.extend_from_slice(&self.positions[rows]);
            let parent = node.parent.filter(|&parent| !rest.nodes[parent].rows.is_empty());
            rest.nodes.push(Node { rows: first..rest.ids.len(), parent, start: node.start + there });
        }
        rest.lift();
        rest
    }

    /// What has been made ready for it.
    pub(super) fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Lifts a very short pack to the fewest rows of a product.
    fn lift(&mut self) {
        let rows = self.ids.len().max(MIN_ROWS);
        self.ids.resize(rows, 0);
        self.type_ids.resize(rows, 0);
        self.positions.resize(rows, 0);
    }

    /// A forest without samples: runs of so many tokens, each behind its parent, which stands before it.
    pub(super) fn bare(runs: &[(Option<usize>, usize)]) -> Self {
        let mut nodes: Vec<Node> = Vec::with_capacity(runs.len());
        for &(parent, tokens) in runs {
            let first = nodes.last().map_or(0, |node| node.rows.end);
            let start = parent.map_or(0, |parent| nodes[parent].start + nodes[parent].rows.len());
            nodes.push(Node { rows: first..first + tokens, parent, start });
        }
        let positions: Vec<u32> = nodes.iter().flat_map(|node| node.start as u32..(node.start + node.rows.len()) as u32).collect();
        let longest = nodes.iter().map(|node| node.start + node.rows.len()).max().unwrap_or(0);
        let zeros = vec![0; positions.len()];
        Self { ids: zeros.clone(), type_ids: zeros, positions, nodes, samples: Vec::new(), longest, ready: Ready::default() }
    }

    /// Tokens that a forward computes: those of all samples, less what is shared.
    pub fn computed_tokens(&self) -> usize {
        self.nodes.iter().map(|node| node.rows.len()).sum()
    }

    /// The same where the first `there` tokens of each sample need not be computed.
    pub fn computed_without(&self, there: impl Fn(usize) -> usize) -> usize {
        let mut least = vec![usize::MAX; self.nodes.len()];
        for (sample, slot) in self.samples.iter().enumerate() {
            let (there, mut next) = (there(sample), Some(slot.leaf));
            while let Some(node) = next {
                least[node] = least[node].min(there);
                next = self.nodes[node].parent;
            }
        }
        let computed = |(node, least): (&Node, usize)| node.rows.len() - least.saturating_sub(node.start).min(node.rows.len());
        self.nodes.iter().zip(least).map(computed).sum()
    }

    /// Tokens of a sample that come before all that is computed of it.
    pub fn absent_tokens(&self, sample: usize) -> usize {
        let mut node = &self.nodes[self.samples[sample].leaf];
        while let Some(parent) = node.parent {
            node = &self.nodes[parent];
        }
        node.start
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

    /// The row ranges that a node's queries see, from the first that is computed to the node itself.
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
#[path = "pack_tests.rs"]
mod tests;
