//! Beginnings of samples that earlier packs have computed, in blocks of tokens: what is found again, what is kept, and what
//! goes. Pure; what a block holds is the caller's business.
//!
//! Where the prompt of a lone sample ends nobody knows, so every whole block of it is kept, each behind the one before it:
//! a tree, as in SGLang's radix cache (2312.07104). A sample takes the path that agrees with it longest; of the last block
//! it may take a part, since keys and values depend on nothing behind them. Blocks go from the ends of paths, the least
//! recently used first; but those that were never used again and those that were are each entitled to half of the room, so
//! that a stream of completions that nobody asks for twice does not drive out the prompts that many do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::pack::{MIN_SHARED, Pack, PrefixKey};
use super::trie::common_prefix;

/// Tokens of a block: those that attention takes at once.
pub use super::kernels::attention::BLOCK;

/// What a block follows on. The first of a path has the key that tells apart samples whose tokens are rotated differently.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    First(PrefixKey),
    After(u64),
}

/// A block's place and its tokens, compared as they are: a hash would some day take one prompt for another.
type Key = (Place, Vec<u32>);

#[derive(Debug)]
struct Entry<T> {
    key: Key,
    /// Absent while its pack is computed.
    block: Option<Arc<T>>,
    /// The pack that last had to do with it.
    used: u64,
    /// Whether a later pack than its own has used it.
    again: bool,
    /// Blocks that follow on it.
    followers: usize,
}

/// A cache of so many blocks.
#[derive(Debug)]
pub struct PrefixCache<T> {
    capacity: usize,
    /// The pack at hand.
    now: u64,
    serial: u64,
    entries: HashMap<u64, Entry<T>>,
    /// In order, so that the neighbours of what is looked up have the most in common with it.
    by_key: BTreeMap<Key, u64>,
    /// Blocks that none follows on, by last use; those never used again, and those that were.
    ends: [BTreeSet<(u64, u64)>; 2],
    /// Blocks never used again, and those that were.
    counts: [usize; 2],
}

/// What of a pack is there already, and what is to be kept of it.
#[derive(Debug)]
pub struct Plan<T> {
    /// By node: how many of its first tokens need not be computed.
    pub there: Vec<usize>,
    /// By node: the blocks that stand before its first token that is computed, the last of them in part. Empty for nodes
    /// whose parents have something left to compute.
    pub past: Vec<Vec<Arc<T>>>,
    pub wanted: Vec<Wanted>,
}

/// A block to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    id: u64,
    /// The node that computes its last token.
    pub node: usize,
    /// Which block it is of the node's path.
    pub block: usize,
}

/// A path as far as it agrees with a sample.
struct Found {
    tokens: usize,
    ids: Vec<u64>,
}

impl<T> PrefixCache<T> {
    pub fn new(capacity: usize) -> Self {
        let (entries, by_key) = (HashMap::new(), BTreeMap::new());
        Self { capacity, now: 0, serial: 0, entries, by_key, ends: Default::default(), counts: [0; 2] }
    }

    /// Blocks that are held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Finds what is there of a pack, and makes room for what it will bring. `key` is as for [`Pack::forest`];
    /// `first_read` is the first position of a sample whose output is asked for, which is computed whatever is there.
    pub fn plan(&mut self, pack: &Pack, key: impl Fn(usize) -> Option<PrefixKey>, first_read: impl Fn(usize) -> usize) -> Plan<T> {
        self.now += 1;
        let nodes = pack.nodes();
        // By node: a sample that runs through it, its key, and how far the node may be taken from here.
        let mut through: Vec<Option<(usize, PrefixKey, usize)>> = vec![None; nodes.len()];
        for sample in 0..pack.len() {
            let encoding = pack.encoding(sample);
            let Some(key) = key(encoding.tokens()).filter(|_| encoding.type_ids().is_none()) else { continue };
            let most = first_read(sample);
            let mut next = Some(pack.leaf(sample));
            while let Some(node) = next {
                match &mut through[node] {
                    Some((_, _, least)) => *least = most.min(*least),
                    unset => *unset = Some((sample, key.clone(), most)),
                }
                next = nodes[node].parent;
            }
        }
        let mut plan = Plan { there: vec![0; nodes.len()], past: Vec::new(), wanted: Vec::new() };
        let mut found: Vec<Vec<u64>> = Vec::with_capacity(nodes.len());
        for (index, node) in nodes.iter().enumerate() {
            let mut ids = Vec::new();
            let all_before = node.parent.is_none_or(|parent| plan.there[parent] == nodes[parent].rows.len());
            if let (true, Some((sample, key, most))) = (all_before, &through[index]) {
                let end = node.start + node.rows.len();
                let path = self.find(key, &pack.encoding(*sample).ids()[..end.min(*most)]);
                plan.there[index] = path.tokens.saturating_sub(node.start);
                ids = match node.parent {
                    // Of a block further on too little is in common, but all that was found for the parent stands.
                    Some(parent) if path.tokens < node.start => found[parent].clone(),
                    _ => path.ids,
                };
            }
            found.push(ids);
        }
        for ids in &found {
            for id in ids {
                self.touch(*id);
            }
            plan.past.push(ids.iter().filter_map(|id| self.entries.get(id)?.block.clone()).collect());
        }
        self.want(pack, &through, &found, &mut plan);
        plan
    }

    /// The longest path that agrees with these tokens, and the blocks on it.
    fn find(&self, key: &PrefixKey, ids: &[u32]) -> Found {
        let mut found = Found { tokens: 0, ids: Vec::new() };
        let mut place = Place::First(key.clone());
        for block in ids.chunks(BLOCK) {
            let Some((id, common)) = self.nearest(place, block) else { break };
            // Were a few tokens of a template in common enough, every first block would look as if it were used again.
            let filled = self.entries.get(&id).is_some_and(|entry| entry.block.is_some());
            if common < MIN_SHARED.min(block.len()) || !filled {
                break;
            }
            found.tokens += common;
            found.ids.push(id);
            if common < BLOCK {
                break;
            }
            place = Place::After(id);
        }
        found
    }

    /// The block at this place that agrees longest with `tokens`, and how long.
    fn nearest(&self, place: Place, tokens: &[u32]) -> Option<(u64, usize)> {
        let sought = (place, tokens.to_vec());
        let sides = [self.by_key.range(..&sought).next_back(), self.by_key.range(&sought..).next()];
        let there = sides.into_iter().flatten().filter(|(key, _)| key.0 == sought.0);
        there.map(|((_, held), id)| (*id, common_prefix(held, tokens))).max_by_key(|(_, common)| *common)
    }

    /// Makes room for the whole blocks that the pack computes, those that stand first in their samples first.
    fn want(&mut self, pack: &Pack, through: &[Option<(usize, PrefixKey, usize)>], found: &[Vec<u64>], plan: &mut Plan<T>) {
        let nodes = pack.nodes();
        let first = |node: usize| (nodes[node].start + plan.there[node]) / BLOCK;
        let end = |node: usize| (nodes[node].start + nodes[node].rows.len()) / BLOCK;
        let mut blocks: Vec<(usize, usize)> = (0..nodes.len())
            .filter(|&node| through[node].is_some() && plan.there[node] < nodes[node].rows.len())
            .flat_map(|node| (first(node)..end(node)).map(move |block| (block, node)))
            .collect();
        blocks.sort_unstable();
        let mut ids: HashMap<(usize, usize), u64> = HashMap::new();
        let mut wanted = Vec::new();
        for (block, node) in blocks {
            let Some((sample, key, _)) = &through[node] else { continue };
            let place = match block.checked_sub(1) {
                None => Place::First(key.clone()),
                Some(before) => {
                    // The nearest node above that computes the block before, or else what was found before all of them.
                    let mut above = node;
                    let held = loop {
                        match nodes[above].parent {
                            _ if before >= first(above) => break ids.get(&(above, before)),
                            Some(parent) if plan.there[parent] < nodes[parent].rows.len() => above = parent,
                            _ => break found[above].get(before),
                        }
                    };
                    let Some(id) = held else { continue };
                    Place::After(*id)
                }
            };
            let tokens = &pack.encoding(*sample).ids()[block * BLOCK..(block + 1) * BLOCK];
            let sought = (place, tokens.to_vec());
            if let Some(&id) = self.by_key.get(&sought) {
                // It is there, but could not be used: something in it is read.
                self.touch(id);
                ids.insert((node, block), id);
            } else if let Some(id) = self.reserve(sought) {
                ids.insert((node, block), id);
                wanted.push(Wanted { id, node, block });
            }
        }
        plan.wanted = wanted;
    }

    /// A place for one more block, unless all others belong to the pack at hand.
    fn reserve(&mut self, key: Key) -> Option<u64> {
        // What it follows on belongs to this pack, and so stays.
        while self.entries.len() >= self.capacity {
            self.evict()?;
        }
        self.serial += 1;
        let id = self.serial;
        if let Place::After(before) = key.0 {
            let entry = self.entries.get_mut(&before)?;
            entry.followers += 1;
            self.ends[usize::from(entry.again)].remove(&(entry.used, before));
        }
        self.by_key.insert(key.clone(), id);
        self.entries.insert(id, Entry { key, block: None, used: self.now, again: false, followers: 0 });
        self.ends[0].insert((self.now, id));
        self.counts[0] += 1;
        Some(id)
    }

    /// Puts into its place what was made of a wanted block; `None`: nothing that may be kept.
    pub fn fill(&mut self, wanted: Wanted, block: Option<T>) {
        match block {
            Some(block) => {
                if let Some(entry) = self.entries.get_mut(&wanted.id) {
                    entry.block = Some(Arc::new(block));
                }
            }
            None => self.remove(wanted.id),
        }
    }

    /// Drops what was used last the longest ago, at the end of its path; `None` if all that is left is in use.
    fn evict(&mut self) -> Option<()> {
        let oldest = |ends: &BTreeSet<(u64, u64)>| ends.first().filter(|(used, _)| *used < self.now).map(|(_, id)| *id);
        let [once, again] = [oldest(&self.ends[0]), oldest(&self.ends[1])];
        let id = if 2 * self.counts[0] > self.capacity { once.or(again) } else { again.or(once) };
        self.remove(id?);
        Some(())
    }

    /// Drops a block and all that follow on it.
    fn remove(&mut self, id: u64) {
        let mut going = vec![id];
        while let Some(id) = going.pop() {
            let Some(entry) = self.entries.remove(&id) else { continue };
            self.by_key.remove(&entry.key);
            self.ends[usize::from(entry.again)].remove(&(entry.used, id));
            self.counts[usize::from(entry.again)] -= 1;
            if entry.followers > 0 {
                let followers = self.by_key.range((Place::After(id), Vec::new())..);
                going.extend(followers.take_while(|((place, _), _)| *place == Place::After(id)).map(|(_, id)| *id));
            }
            if let Place::After(before) = entry.key.0
                && let Some(above) = self.entries.get_mut(&before)
            {
                above.followers -= 1;
                if above.followers == 0 {
                    self.ends[usize::from(above.again)].insert((above.used, before));
                }
            }
        }
    }

    /// The pack at hand has to do with this block.
    fn touch(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let (before, was) = (entry.used, usize::from(entry.again));
        // A sample that stands in a pack twice is no later use.
        let is = usize::from(entry.again || before < self.now);
        (entry.used, entry.again) = (self.now, is == 1);
        self.counts[was] -= 1;
        self.counts[is] += 1;
        if entry.followers == 0 {
            self.ends[was].remove(&(before, id));
            self.ends[is].insert((self.now, id));
        }
    }
}

#[cfg(test)]
#[path = "prefix_cache_tests.rs"]
mod tests;
