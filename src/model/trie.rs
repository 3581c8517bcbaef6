//! What samples begin with in common, found on their token ids. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use crate::text::Encoding;

/// What a sample's rotation depends on beside positions: two samples may share tokens only if theirs are equal.
pub type PrefixKey = Vec<usize>;

/// The fewest tokens that are worth a run of their own: below, what is saved is less than what a further run costs.
pub const MIN_SHARED: usize = 16;

/// A stretch of tokens that one or more samples have in common at the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub parent: Option<usize>,
    /// A sample that has it, and where in the sample it stands.
    pub sample: usize,
    pub start: usize,
    pub end: usize,
    /// Samples that run through it or end in it.
    pub samples: usize,
}

/// A radix tree over token ids. A run is cut only where at least [`MIN_SHARED`] tokens of it are shared, so two runs may
/// begin with a few equal tokens.
#[derive(Debug, Default)]
pub struct Trie {
    runs: Vec<Run>,
    /// The runs that follow on each run.
    followers: Vec<Vec<usize>>,
    /// The runs that samples of each key begin with.
    roots: HashMap<PrefixKey, Vec<usize>>,
    leaves: Vec<usize>,
}

impl Trie {
    pub fn grow(samples: &[Arc<Encoding>], key: impl Fn(usize) -> Option<PrefixKey>) -> Self {
        let mut trie = Self::default();
        for (index, sample) in samples.iter().enumerate() {
            // Segment numbers belong to encoders, whose tokens see what comes after them.
            let key = if sample.type_ids().is_none() { key(sample.tokens()) } else { None };
            let leaf = match key {
                Some(key) => trie.insert(samples, index, key),
                None => trie.push(Run { parent: None, sample: index, start: 0, end: sample.tokens(), samples: 1 }),
            };
            trie.leaves.push(leaf);
        }
        trie
    }

    fn push(&mut self, run: Run) -> usize {
        self.runs.push(run);
        self.followers.push(Vec::new());
        self.runs.len() - 1
    }

    /// The run that the sample ends in.
    fn insert(&mut self, samples: &[Arc<Encoding>], sample: usize, key: PrefixKey) -> usize {
        let ids = samples[sample].ids();
        let (mut parent, mut start) = (None, 0);
        loop {
            let siblings = match parent {
                None => self.roots.entry(key.clone()).or_default(),
                Some(parent) => &mut self.followers[parent],
            };
            let matched = siblings.iter_mut().filter_map(|sibling| {
                let run = self.runs[*sibling];
                let common = common_prefix(&samples[run.sample].ids()[start..run.end], &ids[start..]);
                (common == run.end - start || common >= MIN_SHARED).then_some((common, sibling))
            });
            let Some((common, place)) = matched.max_by_key(|(common, _)| *common) else {
                let leaf = self.runs.len();
                siblings.push(leaf);
                return self.push(Run { parent, sample, start, end: ids.len(), samples: 1 });
            };
            let mut run = *place;
            let at = start + common;
            if at < self.runs[run].end {
                // The upper half takes the place of the whole, whose number stays with the lower half and what follows it.
                let upper = self.runs.len();
                *place = upper;
                self.push(Run { end: at, ..self.runs[run] });
                self.followers[upper].push(run);
                (self.runs[run].parent, self.runs[run].start) = (Some(upper), at);
                run = upper;
            }
            self.runs[run].samples += 1;
            if at == ids.len() {
                return run;
            }
            (parent, start) = (Some(run), at);
        }
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The run that a sample ends in.
    pub fn leaf(&self, sample: usize) -> usize {
        self.leaves[sample]
    }

    /// Tokens of all runs.
    pub fn tokens(&self) -> usize {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// Tokens of the samples that end in `leaf` that other samples have as well.
    pub fn shared(&self, leaf: usize) -> usize {
        let mut next = Some(leaf);
        // Whatever is shared is all that stands before it, so the first shared run from below has it all.
        while let Some(run) = next {
            if self.runs[run].samples > 1 {
                return self.runs[run].end;
            }
            next = self.runs[run].parent;
        }
        0
    }

    /// All runs, each after its parent and else in the order in which samples brought them.
    pub fn parents_first(&self) -> Vec<usize> {
        let mut order = Vec::with_capacity(self.runs.len());
        let mut placed = vec![false; self.runs.len()];
        let mut path = Vec::new();
        for &leaf in &self.leaves {
            let mut next = Some(leaf);
            while let Some(run) = next
                && !placed[run]
            {
                placed[run] = true;
                path.push(run);
                next = self.runs[run].parent;
            }
            order.extend(path.drain(..).rev());
        }
        order
    }
}

/// How many tokens two samples begin with in common.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    // Blocks compare at the speed of memory, tokens one by one do not.
    const BLOCK: usize = 64;
    let blocks = a.chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK)).take_while(|(a, b)| a == b).count() * BLOCK;
    blocks + a[blocks..].iter().zip(&b[blocks..]).take_while(|(a, b)| a == b).count()
}
