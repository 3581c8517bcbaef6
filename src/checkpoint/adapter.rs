//! A PEFT LoRA adapter on its base: a checkpoint whose tensors are computed when they are read.
//!
//! An adapted matrix is `W + s · B A` (LoRA, 2106.09685), with `s = alpha / r`, or `alpha / sqrt(r)` for rsLoRA. It is computed in
//! float64 from the stored numbers, block by block, and not rounded: whoever averages such tensors gets `W + mean(s · B A)`,
//! never the product of averaged factors, which is another matrix.

mod config;
mod fields;
mod keys;
mod low_rank;
mod open;
mod parts;
mod pattern;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::source::look_up;
use super::{Dtype, Elements, FileStamp, Manifest, SourceError, TensorSource};
use crate::lock::lock;
use low_rank::Panels;
pub use open::{named_base, open};
use parts::Parts;
pub use parts::{Orientation, Origin, Part, Summand, Term};

pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// Tensors whose factors are kept between reads: blocks of one tensor are read one after the other, or by several threads.
const KEPT: usize = 2;

/// An adapter on its base. Reading needs memory for the factors of two tensors and one block of the base for each thread.
pub struct Adapter {
    base: Arc<dyn TensorSource>,
    stored: Arc<dyn TensorSource>,
    parts: Arc<Parts>,
    place: Arc<Place>,
    /// Factors of the tensors that were read last, the newest at the end.
    recent: Mutex<Vec<(String, Arc<Factors>)>>,
    /// Buffers between reads; as many as were ever needed at once.
    scratch: Mutex<Vec<Elements>>,
}

/// Where an adapter and its base lie.
#[derive(Debug)]
pub struct Place {
    /// The adapter's folder, as it was named.
    pub adapter: PathBuf,
    /// The base's, as the file system knows it: two adapters on one base have the same.
    pub base: PathBuf,
    /// The one of the two whose tokenizer and templates count.
    pub text: PathBuf,
}

/// The factors of one tensor, in memory.
struct Factors {
    /// Row by row of the wide matrix, or column by column if it is stored the other way round.
    left: Elements,
    right: Panels,
}

impl Adapter {
    /// `base` and `stored` have the manifests that `parts` was joined from.
    pub fn new(base: Arc<dyn TensorSource>, stored: Arc<dyn TensorSource>, parts: Arc<Parts>, place: Arc<Place>) -> Self {
        Self { base, stored, parts, place, recent: Mutex::default(), scratch: Mutex::default() }
    }

    /// The same adapter, reading through other sources of the same tensors: ones that remember what they read, or that read once
    /// for several adapters.
    pub fn through(&self, base: Arc<dyn TensorSource>, stored: Arc<dyn TensorSource>) -> Self {
        Self::new(base, stored, Arc::clone(&self.parts), Arc::clone(&self.place))
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    pub fn base(&self) -> &Arc<dyn TensorSource> {
        &self.base
    }

    /// The tensors of the adapter's file.
    pub fn stored(&self) -> &Arc<dyn TensorSource> {
        &self.stored
    }

    /// What a tensor is made from.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.parts.get(name)
    }

    /// Reads the stored tensor that a tensor is made from: what is there before the adapter adds its term.
    pub fn read_bare(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        look_up(self.manifest(), name, &range)?;
        let missing = || SourceError::NoSuchTensor { tensor: name.to_owned(), problem: "it is made from nothing".to_owned() };
        self.read_origin(&self.part(name).ok_or_else(missing)?.origin, range, into)
    }

    /// Bytes that factors take while tensors are read, at most.
    pub fn factor_bytes(&self) -> u64 {
        let bytes = |(name, part): (&String, &Part)| {
            let Some(Term { summand: Summand::Product { a, b, rank, orientation }, .. }) = &part.term else { return (0, 0) };
            let (left, right) = if *orientation == Orientation::Rows { (b, a) } else { (a, b) };
            let columns = self.manifest().get(name).and_then(|info| info.shape.last().copied()).unwrap_or_default();
            let stored = |name: &String| self.stored.manifest().get(name).map_or(0, |info| info.bytes());
            let panels = Panels::bytes(*rank, columns);
            // The right one is in memory as it is stored, in float64, and in panels, while it is prepared.
            (stored(left) + panels, stored(right) + panels)
        };
        let all: Vec<(u64, u64)> = self.parts.parts.iter().map(bytes).collect();
        let most = |bytes: fn(&(u64, u64)) -> u64| all.iter().map(bytes).max().unwrap_or_default();
        KEPT as u64 * most(|(kept, _)| *kept) + most(|(_, preparing)| *preparing)
    }

    fn read_origin(&self, origin: &Origin, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        match origin {
            Origin::Base(name) => self.base.read(name, range, into),
            Origin::Adapter(name) => self.stored.read(name, range, into),
        }
    }

    /// The origin's elements in float64.
    fn widen_origin(&self, origin: &Origin, range: Range<usize>, into: &mut [f64]) -> Result<(), SourceError> {
        let mut buffer = lock(&self.scratch).pop().unwrap_or_default();
        let outcome = self.read_origin(origin, range, &mut buffer);
        if outcome.is_ok() {
            buffer.widen(0..buffer.len(), into);
        }
        lock(&self.scratch).push(buffer);
        outcome
    }

    fn add(&self, name: &str, term: &Term, shape: &[usize], range: Range<usize>, into: &mut [f64]) -> Result<(), SourceError> {
        match &term.summand {
            Summand::Vector(bias) => {
                let mut elements = Elements::default();
                self.stored.read(bias, range, &mut elements)?;
                let mut wide = vec![0.0; elements.len()];
                elements.widen(0..elements.len(), &mut wide);
                into.iter_mut().zip(wide).for_each(|(y, bias)| *y += term.scale * bias);
            }
            Summand::Product { a, b, rank, orientation } => {
                let &[rows, columns] = shape else { return Ok(()) };
                let factors = self.factors(name, (a, b), *rank, *orientation, columns)?;
                let (first, last) = (range.start / columns, range.end.div_ceil(columns));
                let left = factors.rows(first..last, rows, *rank, *orientation);
                factors.right.add(into, range.start % columns, &left, term.scale);
            }
        }
        Ok(())
    }

    /// The factors of a tensor, read whole if they are not at hand. Who needs them meanwhile waits: it is the same ones. So
    /// what `stored` reads, it must read without handing work to a pool whose threads may be waiting here.
    fn factors(
        &self,
        name: &str,
        (a, b): (&str, &str),
        rank: usize,
        orientation: Orientation,
        columns: usize,
    ) -> Result<Arc<Factors>, SourceError> {
        let mut recent: MutexGuard<_> = lock(&self.recent);
        if let Some((_, factors)) = recent.iter().find(|(known, _)| known == name) {
            return Ok(Arc::clone(factors));
        }
        let whole = |stored: &str| {
            let mut elements = Elements::default();
            let count = self.stored.manifest().get(stored).map_or(0, |info| info.elements());
            self.stored.read(stored, 0..count, &mut elements).map(|()| elements)
        };
        let (left, right, transposed) = match orientation {
            Orientation::Rows => (whole(b)?, whole(a)?, false),
            Orientation::Columns => (whole(a)?, whole(b)?, true),
        };
        let factors = Arc::new(Factors { left, right: Panels::new(&right, rank, columns, transposed) });
        if recent.len() == KEPT {
            recent.remove(0);
        }
        recent.push((name.to_owned(), Arc::clone(&factors)));
        Ok(factors)
    }

    /// Whether numbers are large enough for a sum to be infinite: those of float64 alone are.
    fn may_overflow(&self, part: &Part) -> bool {
        let summands = match part.term.as_ref().map(|term| &term.summand) {
            None => Vec::new(),
            Some(Summand::Vector(bias)) => vec![bias],
            Some(Summand::Product { a, b, .. }) => vec![a, b],
        };
        let origin = part.origin.info(self.base.manifest(), self.stored.manifest());
        summands.iter().filter_map(|name| self.stored.manifest().get(name)).chain(origin).any(|info| info.dtype == Dtype::F64)
    }
}

impl Factors {
    /// The left factor of some rows of the wide matrix, row by row.
    fn rows(&self, range: Range<usize>, rows: usize, rank: usize, orientation: Orientation) -> Vec<f64> {
        let count = range.len();
        let mut wide = vec![0.0; count * rank];
        match orientation {
            Orientation::Rows => self.left.widen(range.start * rank..range.end * rank, &mut wide),
            Orientation::Columns => {
                let mut column = vec![0.0; count];
                for k in 0..rank {
                    self.left.widen(k * rows + range.start..k * rows + range.end, &mut column);
                    wide.iter_mut().skip(k).step_by(rank).zip(&column).for_each(|(wide, number)| *wide = *number);
                }
            }
        }
        wide
    }
}

impl TensorSource for Adapter {
    fn manifest(&self) -> &Manifest {
        &self.parts.manifest
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let info = look_up(self.manifest(), name, &range)?;
        let missing = || SourceError::NoSuchTensor { tensor: name.to_owned(), problem: "it is made from nothing".to_owned() };
        let part = self.part(name).ok_or_else(missing)?;
        let Some(term) = &part.term else { return self.read_origin(&part.origin, range, into) };
        into.reset(Dtype::F64, range.len());
        let Elements::F64(values) = into else { return Err(missing()) };
        if range.is_empty() {
            return Ok(());
        }
        self.widen_origin(&part.origin, range.clone(), values)?;
        self.add(name, term, &info.shape, range.clone(), values)?;
        if self.may_overflow(part)
            && let Some((index, value)) = into.first_non_finite()
        {
            return Err(SourceError::NonFinite {
                file: self.place.adapter.display().to_string(),
                tensor: name.to_owned(),
                index: range.start + index,
                value,
            });
        }
        Ok(())
    }

    fn files(&self) -> Option<Vec<FileStamp>> {
        Some([self.base.files()?, self.stored.files()?].concat())
    }

    fn adapter(&self) -> Option<&Adapter> {
        Some(self)
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("place", &self.place).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "adapter_tests.rs"]
mod tests;
