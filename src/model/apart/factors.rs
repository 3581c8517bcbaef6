//! The factors of an adapter on the device, as the products that they are added to meet them.

use candle_core::{Result as CandleResult, Tensor};

use super::super::LoadError;
use super::super::kernels::low_rank::padded;
use super::super::ops::Ops;
use super::super::reading::places;
use super::super::weights::Loader;
use super::Destination;
use crate::checkpoint::{Adapter, Elements, LinearKeys, Orientation, Summand, TensorInfo, Term};

/// What is added to one product: `U = x F` by the inner factors of all adapted matrices side by side, and for each of them
/// the product of its columns of `U` with its outer factor.
#[derive(Debug)]
pub struct Factors {
    /// `[inputs, ranks side by side]`.
    inner: Tensor,
    outer: Vec<Outer>,
}

/// The outer factor of one matrix, with the scale in it.
#[derive(Debug)]
struct Outer {
    /// `[rank, outputs]`.
    factor: Tensor,
    /// Which columns of `U` it meets.
    first: usize,
    rank: usize,
    /// Which columns of the product it adds to.
    output: usize,
    outputs: usize,
}

/// What is added to the rows of a table.
#[derive(Debug)]
pub struct RowFactors {
    /// `[rows, rank]`.
    rows: Tensor,
    outer: Outer,
}

/// Both factors of a stored matrix `[rows, columns]`: `left` is `[rows, rank]`, `right` is `[rank, columns]`.
struct Halves {
    rank: usize,
    rows: usize,
    columns: usize,
    left: Vec<f64>,
    right: Vec<f64>,
}

impl Factors {
    /// What is added to matrices that stand side by side, each by its own term; `None` where nothing is.
    pub fn load(loader: &mut Loader, parts: &[LinearKeys], added: &[Option<&Term>], adapter: &Adapter) -> Result<Option<Self>, LoadError> {
        let Some(inputs) = parts.first().map(|part| part.inputs) else { return Ok(None) };
        // Views of one stored matrix meet one inner factor.
        let mut inner: Vec<(&str, Halves, bool)> = Vec::new();
        let mut met = Vec::new();
        let mut output = 0;
        for (part, term) in parts.iter().zip(added) {
            if let Some(term) = term {
                let index = match inner.iter().position(|(name, ..)| *name == part.weight) {
                    Some(known) => known,
                    None => {
                        inner.push((&part.weight, Halves::read(adapter, &part.weight, term)?, part.transposed.is_some()));
                        inner.len() - 1
                    }
                };
                met.push((index, part, term.scale, output));
            }
            output += part.outputs;
        }
        if inner.is_empty() {
            return Ok(None);
        }
        let mut firsts = Vec::with_capacity(inner.len());
        let mut ranks = 0;
        for (_, halves, _) in &inner {
            firsts.push(ranks);
            ranks += halves.rank;
        }
        let mut columns = Vec::with_capacity(ranks);
        for (_, halves, transposed) in &inner {
            columns.extend((0..halves.rank).map(|k| (halves, *transposed, k)));
        }
        let of_input = |input: usize, column: usize| {
            let (halves, transposed, k) = columns[column];
            (if transposed { halves.left(input, k) } else { halves.right(k, input) }) as f32
        };
        let inner_factor = place(loader, inputs, ranks, of_input)?;
        let mut outer = Vec::with_capacity(met.len());
        for (index, part, scale, output) in met {
            let (_, halves, transposed) = &inner[index];
            let stored: Vec<usize> = places(part.rows, part.outputs).collect();
            let value = |k: usize, column: usize| {
                let number = if *transposed { halves.right(k, stored[column]) } else { halves.left(stored[column], k) };
                (scale * number) as f32
            };
            let factor = place(loader, halves.rank, part.outputs, value)?;
            outer.push(Outer { factor, first: firsts[index], rank: halves.rank, output, outputs: part.outputs });
        }
        Ok(Some(Self { inner: inner_factor, outer }))
    }

    /// `y`, which is the product of `x` with the base's matrices, with that of the factors added.
    pub fn add(&self, ops: Ops, x: &Tensor, y: Tensor) -> CandleResult<Tensor> {
        let met = ops.project(x, &self.inner)?;
        self.outer.iter().try_fold(y, |y, outer| outer.add(ops, &met, y))
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> CandleResult<Self> {
        Ok(Self { inner: to.copy(&self.inner)?, outer: self.outer.iter().map(|outer| outer.on(to)).collect::<CandleResult<_>>()? })
    }
}

impl RowFactors {
    /// What is added to a table whose every element is multiplied by `factor`.
    pub fn load(loader: &mut Loader, name: &str, term: &Term, factor: f64, adapter: &Adapter) -> Result<Self, LoadError> {
        let halves = Halves::read(adapter, name, term)?;
        let Halves { rank, rows, columns, .. } = halves;
        let scale = term.scale * factor;
        let outer = place(loader, rank, columns, |k, column| (scale * halves.right(k, column)) as f32)?;
        let left = halves.left.iter().map(|number| *number as f32).collect();
        let rows = loader.place(left, &[rows, rank], loader.backend().weights)?;
        Ok(Self { rows, outer: Outer { factor: outer, first: 0, rank, output: 0, outputs: columns } })
    }

    /// `y`, which is these rows of the base's table, with what is added to them.
    pub fn add(&self, ops: Ops, ids: &Tensor, y: Tensor) -> CandleResult<Tensor> {
        self.outer.add(ops, &self.rows.index_select(ids, 0)?, y)
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> CandleResult<Self> {
        Ok(Self { rows: to.copy(&self.rows)?, outer: self.outer.on(to)? })
    }
}

impl Outer {
    fn add(&self, ops: Ops, met: &Tensor, y: Tensor) -> CandleResult<Tensor> {
        let met = if met.dim(1)? == self.rank { met.clone() } else { met.narrow(1, self.first, self.rank)? };
        ops.add_product(y, &met, &self.factor, self.output, self.outputs)
    }

    fn on(&self, to: Destination) -> CandleResult<Self> {
        Ok(Self { factor: to.copy(&self.factor)?, ..*self })
    }
}

/// A factor `[depth, columns]` as its products read it: the kernels with padding, candle's as a view of the other orientation.
fn place(loader: &mut Loader, depth: usize, columns: usize, value: impl Fn(usize, usize) -> f32) -> Result<Tensor, LoadError> {
    let weights = loader.backend().weights;
    if loader.backend().ops == Ops::Plain {
        let values = (0..columns).flat_map(|column| (0..depth).map(move |k| (k, column))).map(|(k, column)| value(k, column)).collect();
        return Ok(loader.place(values, &[columns, depth], weights)?.t()?);
    }
    let width = padded(columns);
    let mut values = vec![0.0; depth * width];
    for (k, row) in values.chunks_exact_mut(width).enumerate() {
        row.iter_mut().take(columns).enumerate().for_each(|(column, into)| *into = value(k, column));
    }
    loader.place(values, &[depth, width], weights)
}

/// Elements that [`place`] takes on the device.
pub(super) fn placed_elements(ops: Ops, depth: usize, columns: usize) -> usize {
    depth * if ops == Ops::Kernels { padded(columns) } else { columns }
}

impl Halves {
    /// The factors that `term` adds to the matrix `name`.
    fn read(adapter: &Adapter, name: &str, term: &Term) -> Result<Self, LoadError> {
        let wrong = |problem: &str| LoadError::Tensor { tensor: name.to_owned(), problem: problem.to_owned() };
        let Summand::Product { a, b, rank, orientation } = &term.summand else { return Err(wrong("expected factors, found a vector")) };
        let [rows, columns] =
            *crate::checkpoint::TensorSource::manifest(adapter).get(name).map(|info| info.shape.as_slice()).unwrap_or_default()
        else {
            return Err(wrong("expected the adapted tensor to be a matrix"));
        };
        let read = |stored: &str| -> Result<Vec<f64>, LoadError> {
            let count = adapter.stored().manifest().get(stored).map_or(0, TensorInfo::elements);
            let mut elements = Elements::default();
            adapter.stored().read(stored, 0..count, &mut elements)?;
            let mut wide = vec![0.0; elements.len()];
            elements.widen(0..elements.len(), &mut wide);
            Ok(wide)
        };
        let rank = *rank;
        let (left, right) = match orientation {
            Orientation::Rows => (read(b)?, read(a)?),
            Orientation::Columns => (turned(&read(a)?, rows), turned(&read(b)?, rank)),
        };
        if (left.len(), right.len()) != (rows * rank, rank * columns) {
            return Err(wrong("expected factors of its shape"));
        }
        Ok(Self { rank, rows, columns, left, right })
    }

    fn left(&self, row: usize, k: usize) -> f64 {
        self.left[row * self.rank + k]
    }

    fn right(&self, k: usize, column: usize) -> f64 {
        self.right[k * self.columns + column]
    }
}

/// A matrix of rows of `width` numbers, turned round.
fn turned(values: &[f64], width: usize) -> Vec<f64> {
    (0..width).flat_map(|column| values.iter().skip(column).step_by(width.max(1)).copied()).collect()
}
