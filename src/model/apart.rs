//! Several models on one base: what the base has is placed on the device once, and each model has beside it what is its own.
//!
//! An adapted matrix `W0 + s B A` (LoRA, 2106.09685) is never formed: `W0` is the base's, and a product with it adds
//! `s B (A x)`. What an adapter replaces as a whole, and every product that a replaced matrix is fused into, is the model's
//! own.

mod bytes;
mod factors;

use std::collections::HashMap;
use std::sync::Mutex;

use candle_core::{Device, DeviceLocation, Result as CandleResult, Tensor, TensorId};

use crate::checkpoint::{Adapter, LinearKeys, Origin, Summand, TensorSource, Term};
use crate::lock::lock;
pub use bytes::{ApartBytes, apart_bytes, products};
pub use factors::{Factors, RowFactors};

/// What the models of one base have in common on the device. Needed while they are loaded; each then holds its share.
#[derive(Debug, Default)]
pub struct SharedBase {
    placed: Mutex<HashMap<Key, Tensor>>,
    /// On other devices, by what they are copies of.
    copies: Mutex<HashMap<(TensorId, DeviceLocation), Tensor>>,
}

/// A tensor as it stands on the device, by the names that the base has for what it is made from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// As it is stored, or with every element multiplied by a number, of which these are the bits.
    Tensor(String, Option<u64>),
    /// A norm's weight, which may be stored as its difference from one.
    Norm(String, bool),
    /// Matrices side by side.
    Matrix(Vec<LinearKeys>),
    /// Their biases.
    Bias(Vec<LinearKeys>),
}

/// A model that is told apart from the base that it shares with others.
#[derive(Clone, Copy)]
pub struct Apart<'a> {
    pub base: &'a SharedBase,
    /// The model without what its adapter adds: the same names as in its source, and the same bits in every model of this base
    /// wherever an [`Origin::Base`] is read.
    pub bare: &'a dyn TensorSource,
    pub origins: Origins<'a>,
}

/// Where the tensors of a model come from: an adapter on the base, or the base itself (`None`).
#[derive(Clone, Copy)]
pub struct Origins<'a> {
    pub adapter: Option<&'a Adapter>,
}

/// Matrices of one product whose base is shared.
pub struct SharedProduct<'a> {
    /// By the base's names, without biases.
    pub keys: Vec<LinearKeys>,
    /// What is added to each of them.
    pub added: Vec<Option<&'a Term>>,
}

impl SharedBase {
    pub fn find(&self, key: &Key) -> Option<Tensor> {
        lock(&self.placed).get(key).cloned()
    }

    pub fn keep(&self, key: Key, tensor: &Tensor) {
        lock(&self.placed).insert(key, tensor.clone());
    }
}

impl<'a> Origins<'a> {
    /// The base's name for a tensor, and what the adapter adds to it; `None` for one of the adapter's own.
    fn of_base<'n>(&self, name: &'n str) -> Option<(&'n str, Option<&'a Term>)>
    where
        'a: 'n,
    {
        let Some(adapter) = self.adapter else { return Some((name, None)) };
        let part = adapter.part(name)?;
        match &part.origin {
            Origin::Base(base) => Some((base, part.term.as_ref())),
            Origin::Adapter(_) => None,
        }
    }

    /// The base's name for a tensor that is the base's as it is.
    pub fn untouched<'n>(&self, name: &'n str) -> Option<&'n str>
    where
        'a: 'n,
    {
        self.of_base(name).and_then(|(base, term)| term.is_none().then_some(base))
    }

    /// The base's name for a matrix, and the product that is added to it.
    pub fn table<'n>(&self, name: &'n str) -> Option<(&'n str, Option<&'a Term>)>
    where
        'a: 'n,
    {
        self.of_base(name).filter(|(_, term)| term.is_none_or(is_product))
    }

    /// Matrices that stand side by side, if each of them is the base's with no more than a product added.
    pub fn product(&self, parts: &[LinearKeys]) -> Option<SharedProduct<'a>> {
        let (mut keys, mut added) = (Vec::with_capacity(parts.len()), Vec::with_capacity(parts.len()));
        for part in parts {
            let (base, term) = self.table(&part.weight)?;
            keys.push(LinearKeys { weight: base.to_owned(), bias: None, ..part.clone() });
            added.push(term);
        }
        Some(SharedProduct { keys, added })
    }

    /// The key of biases that stand side by side, if each is the base's as it is.
    pub fn bias(&self, parts: &[LinearKeys]) -> Option<Key> {
        let mut keys = Vec::with_capacity(parts.len());
        for part in parts {
            let bias = match &part.bias {
                Some(bias) => Some(self.untouched(bias)?.to_owned()),
                None => None,
            };
            keys.push(LinearKeys { weight: String::new(), bias, ..part.clone() });
        }
        Some(Key::Bias(keys))
    }
}

fn is_product(term: &Term) -> bool {
    matches!(term.summand, Summand::Product { .. })
}

/// Where copies of a model go: what several models have in common is copied once.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    pub device: &'a Device,
    pub base: Option<&'a SharedBase>,
}

impl Destination<'_> {
    /// The same tensor there. A matrix that is a view of its other orientation stays one.
    pub fn copy(&self, tensor: &Tensor) -> CandleResult<Tensor> {
        let copied = || if tensor.is_contiguous() { tensor.to_device(self.device) } else { tensor.t()?.to_device(self.device)?.t() };
        let Some(base) = self.base else { return copied() };
        let place = (tensor.id(), self.device.location());
        if let Some(known) = lock(&base.copies).get(&place) {
            return Ok(known.clone());
        }
        let made = copied()?;
        lock(&base.copies).insert(place, made.clone());
        Ok(made)
    }

    pub fn optional(&self, tensor: Option<&Tensor>) -> CandleResult<Option<Tensor>> {
        tensor.map(|tensor| self.copy(tensor)).transpose()
    }
}

#[cfg(test)]
#[path = "apart_tests.rs"]
mod tests;
