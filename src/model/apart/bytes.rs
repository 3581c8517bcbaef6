//! What models on one base take on the device, before any of it is read: the loader's own decisions, counted. Pure.

use std::collections::{BTreeSet, HashSet};

use super::super::device::Place;
use super::super::ops::Ops;
use super::super::weights::{joined, padded_outputs};
use super::factors::placed_elements;
use super::{Key, Origins, SharedProduct};
use crate::checkpoint::{Adapter, DenseKeys, Dtype, Layout, LinearKeys, Manifest, MlpKeys, Summand, Term};

/// Bytes on each device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApartBytes {
    /// What the models have in common, once.
    pub base: u64,
    /// What each has of its own.
    pub own: Vec<u64>,
}

impl ApartBytes {
    pub fn total(&self) -> u64 {
        self.own.iter().fold(self.base, |sum, own| sum.saturating_add(*own))
    }
}

/// What models of this layout take: each an adapter on one base, or that base itself (`None`). Where they are loaded and in what
/// is as for [`super::super::load_on`]; `manifest` has the shapes of their tensors. Heads, which stand on the host, are not
/// counted.
pub fn apart_bytes<'a>(
    places: &[Place],
    weights: Dtype,
    layout: &Layout,
    manifest: &Manifest,
    models: impl IntoIterator<Item = Option<&'a Adapter>>,
) -> ApartBytes {
    let (ops, weights) = if places.contains(&Place::Cpu) { (Ops::Kernels, Dtype::F32) } else { (Ops::Plain, weights) };
    let products = products(layout);
    let mut apart = BTreeSet::new();
    for part in products.iter().flatten() {
        apart.extend([Some(&part.weight), part.bias.as_ref()].into_iter().flatten().map(String::as_str));
    }
    apart.extend(layout.head.tensors());
    // The kernels read the norms of heads where the host has them.
    let head_norms = layout.blocks.iter().flat_map(|block| [&block.query_norm, &block.key_norm]).flatten();
    let head_norms: BTreeSet<&str> = head_norms.map(|norm| norm.weight.as_str()).collect();
    let others: Vec<&str> = layout.used().iter().map(String::as_str).filter(|name| !apart.contains(name)).collect();
    let mut count = Count { ops, weights: weights.size(), placed: HashSet::new(), base: 0, own: 0 };
    let own = models.into_iter().map(|adapter| {
        let origins = Origins { adapter };
        count.own = 0;
        products.iter().for_each(|parts| count.product(origins, parts));
        for name in &others {
            let Some(info) = manifest.get(name) else { continue };
            let elements = info.elements();
            if head_norms.contains(name) {
                count.own += if ops == Ops::Kernels { 0 } else { (elements * size_of::<f32>()) as u64 };
            } else if info.shape.len() < 2 {
                let key = origins.untouched(name).map(|base| Key::Norm(base.to_owned(), false));
                count.add(key, (elements * size_of::<f32>()) as u64);
            } else if *name == layout.embedding {
                let table = origins.table(name);
                count.elements(table.map(|(base, _)| Key::Tensor(base.to_owned(), None)), elements);
                count.rows(table.and_then(|(_, term)| term), &info.shape);
            } else {
                count.elements(origins.untouched(name).map(|base| Key::Tensor(base.to_owned(), None)), elements);
            }
        }
        count.own
    });
    let own = own.collect();
    ApartBytes { base: count.base, own }
}

struct Count {
    ops: Ops,
    /// Bytes of an element of a matrix.
    weights: usize,
    placed: HashSet<Key>,
    base: u64,
    own: u64,
}

impl Count {
    /// What has a key is the base's, and counts once.
    fn add(&mut self, key: Option<Key>, bytes: u64) {
        match key {
            Some(key) => self.base += if self.placed.insert(key) { bytes } else { 0 },
            None => self.own += bytes,
        }
    }

    fn elements(&mut self, key: Option<Key>, elements: usize) {
        self.add(key, (elements * self.weights) as u64);
    }

    fn product(&mut self, origins: Origins<'_>, parts: &[&LinearKeys]) {
        let parts = joined(parts);
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let outputs = parts.iter().map(|part| part.outputs).sum();
        let shared = origins.product(&parts);
        let (key, added) = shared.map(|SharedProduct { keys, added }| (Key::Matrix(keys), added)).unzip();
        self.elements(key, padded_outputs(self.ops, outputs) * inputs);
        if parts.iter().any(|part| part.bias.is_some()) {
            self.elements(origins.bias(&parts), outputs);
        }
        let (mut ranks, mut met) = (0, BTreeSet::new());
        for (part, term) in parts.iter().zip(added.unwrap_or_default()) {
            let Some(rank) = term.and_then(rank) else { continue };
            ranks += if met.insert(part.weight.as_str()) { rank } else { 0 };
            self.elements(None, placed_elements(self.ops, rank, part.outputs));
        }
        if ranks > 0 {
            self.elements(None, placed_elements(self.ops, inputs, ranks));
        }
    }

    /// What is added to the rows of a table.
    fn rows(&mut self, term: Option<&Term>, shape: &[usize]) {
        if let (Some(rank), &[rows, columns]) = (term.and_then(rank), shape) {
            self.elements(None, rows * rank + placed_elements(self.ops, rank, columns));
        }
    }
}

fn rank(term: &Term) -> Option<usize> {
    match term.summand {
        Summand::Product { rank, .. } => Some(rank),
        Summand::Vector(_) => None,
    }
}

/// The layers of a model that are multiplied by at once, as its parts ask for them.
pub fn products(layout: &Layout) -> Vec<Vec<&LinearKeys>> {
    fn dense(keys: &DenseKeys) -> [Vec<&LinearKeys>; 2] {
        [keys.gate.iter().chain([&keys.up]).collect(), vec![&keys.down]]
    }
    let mut products: Vec<Vec<&LinearKeys>> = Vec::new();
    let alone =
        [layout.embedding_projection.as_ref(), layout.output_projection.as_ref(), layout.convolution.as_ref().map(|keys| &keys.linear)];
    products.extend(alone.into_iter().flatten().map(|keys| vec![keys]));
    for block in &layout.blocks {
        products.push(vec![&block.query, &block.key, &block.value]);
        products.extend(block.position_projections.iter().flatten().chain([&block.output]).map(|keys| vec![keys]));
        match &block.mlp {
            MlpKeys::Dense(keys) => products.extend(dense(keys)),
            MlpKeys::Experts { router, experts } => {
                products.push(vec![router]);
                products.extend(experts.iter().flat_map(dense));
            }
        }
    }
    products
}
