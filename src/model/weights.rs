//! A tensor source to tensors on a device: pulled chunk by chunk, widened to float32, fused where the forward pass
//! multiplies by several matrices at once, and rounded to what the device multiplies in.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

use super::LoadError;
use super::apart::{Apart, Destination, Factors, Key, Origins, RowFactors, SharedProduct};
use super::device::Backend;
use super::ops::Ops;
use super::placing::{Placer, Room};
use super::reading::{Reader, placed};
use crate::checkpoint::{LinearKeys, Norm, NormKeys, Rows, TensorSource};

/// Fewest outputs of a matrix product. Crate gemm computes a narrower product in an order of additions that depends on
/// the number of rows; zero outputs beside the real ones cost less than a score that depends on its company.
const MIN_OUTPUTS: usize = 80;

/// `y = x W^T (+ b)`, several layers of the checkpoint in one.
#[derive(Debug)]
pub struct Linear {
    /// `[inputs, outputs + padding]`; see [`Ops::weight`].
    weight: Tensor,
    bias: Option<Tensor>,
    /// What an adapter adds to the weight.
    added: Option<Factors>,
    outputs: usize,
    ops: Ops,
    /// Rows of every product, where that is to be one number.
    fixed_rows: Option<usize>,
}

impl Linear {
    /// `[rows, inputs]` to `[rows, at least outputs]`; the columns behind `outputs` are zero.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.weight.dtype())?;
        match self.fixed_rows {
            None => self.product(&x),
            Some(rows) => self.in_blocks(&x, rows),
        }
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        match &self.added {
            Some(added) => added.add(self.ops, x, y),
            None => Ok(y),
        }
    }

    /// Its weight, `[inputs, at least outputs]`, if that is all that there is to it.
    pub fn bare(&self) -> Option<&Tensor> {
        (self.bias.is_none() && self.added.is_none()).then_some(&self.weight)
    }

    /// Block by block of so many rows, the last one lifted by zeros.
    fn in_blocks(&self, x: &Tensor, rows: usize) -> Result<Tensor> {
        let count = x.dim(0)?;
        let mut products = Vec::with_capacity(count.div_ceil(rows));
        for first in (0..count).step_by(rows) {
            let own = rows.min(count - first);
            let block = x.narrow(0, first, own)?;
            let block = if own < rows { block.pad_with_zeros(0, 0, rows - own)? } else { block };
            products.push(self.product(&block)?.narrow(0, 0, own)?);
        }
        match products.as_slice() {
            [one] => Ok(one.clone()),
            all => Tensor::cat(all, 0),
        }
    }

    /// [`Linear::forward`] with the bias added.
    pub fn forward_biased(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.forward(x)?;
        match &self.bias {
            Some(bias) => self.ops.add_bias(y, bias),
            None => Ok(y),
        }
    }

    /// [`Linear::forward_biased`] without the columns behind `outputs`.
    pub fn forward_narrow(&self, x: &Tensor) -> Result<Tensor> {
        narrowed(&self.forward_biased(x)?, self.outputs)
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        let added = self.added.as_ref().map(|added| added.on(to)).transpose()?;
        let (weight, bias) = (to.copy(&self.weight)?, to.optional(self.bias.as_ref())?);
        Ok(Self { weight, bias, added, outputs: self.outputs, ops: self.ops, fixed_rows: self.fixed_rows })
    }
}

/// Without the zero columns that a narrow product was padded with.
pub fn narrowed(x: &Tensor, width: usize) -> Result<Tensor> {
    if x.dim(1)? == width { Ok(x.clone()) } else { x.narrow(1, 0, width)?.contiguous() }
}

/// The norm's weight and bias on the device.
#[derive(Debug)]
pub struct NormWeights {
    weight: Tensor,
    bias: Option<Tensor>,
    ops: Ops,
}

impl NormWeights {
    /// Normalises the leading columns of every row, as many as there are weights.
    pub fn apply(&self, kind: Norm, x: &Tensor) -> Result<Tensor> {
        self.ops.normalise(kind, x, &self.weight, self.bias.as_ref())
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        Ok(Self { weight: to.copy(&self.weight)?, bias: to.optional(self.bias.as_ref())?, ops: self.ops })
    }
}

/// The rows of a table, by their numbers.
#[derive(Debug)]
pub struct Table {
    rows: Tensor,
    added: Option<RowFactors>,
    ops: Ops,
}

impl Table {
    pub fn select(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = self.rows.index_select(ids, 0)?;
        match &self.added {
            Some(added) => added.add(self.ops, ids, rows),
            None => Ok(rows),
        }
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        let added = self.added.as_ref().map(|added| added.on(to)).transpose()?;
        Ok(Self { rows: to.copy(&self.rows)?, added, ops: self.ops })
    }
}

/// Puts what it reads.
type Read<'r, 'a> = &'r mut dyn FnMut(&mut Reader<'a>, &mut Room) -> std::result::Result<(), LoadError>;

/// Reads tensors of one source onto one device, and counts what it read.
pub struct Loader<'a> {
    own: Reader<'a>,
    /// Where the model stands on a base that it shares with others.
    apart: Option<(Apart<'a>, Reader<'a>)>,
    backend: &'a Backend,
    /// What takes to the device what has been read, once there is something to take.
    placer: Option<Placer>,
    progress: &'a mut dyn FnMut(u64, u64),
    total: u64,
    done: u64,
    /// Elements of the tensors that were asked for: the parameters of the model.
    pub parameters: u64,
    /// Bytes that this model's loading has placed on the device; what was there already is not among them.
    pub device_bytes: u64,
}

impl<'a> Loader<'a> {
    pub fn new(
        source: &'a dyn TensorSource,
        apart: Option<Apart<'a>>,
        used: &[String],
        backend: &'a Backend,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let size = |name: &String| source.manifest().get(name).map_or(0, |info| (info.elements() * info.dtype.size()) as u64);
        let total = used.iter().map(size).sum();
        let (own, apart) = (Reader::new(source), apart.map(|apart| (apart, Reader::new(apart.bare))));
        Self { own, apart, backend, placer: None, progress, total, done: 0, parameters: 0, device_bytes: 0 }
    }

    pub fn backend(&self) -> &'a Backend {
        self.backend
    }

    /// A tensor in its own shape.
    pub fn tensor(&mut self, name: &str) -> std::result::Result<Tensor, LoadError> {
        let key = self.untouched(name).map(|base| Key::Tensor(base, None));
        self.once(key, |loader| loader.whole(name, false, None)).inspect(|_| self.count(name, None))
    }

    /// A table with every element multiplied by a factor.
    pub fn table(&mut self, name: &str, factor: Option<f64>) -> std::result::Result<Table, LoadError> {
        let ops = self.backend.ops;
        let found = self.origins().and_then(|origins| Some((origins.table(name)?, origins.adapter)));
        let (key, term) = match found {
            Some(((base, term), adapter)) => (Some(Key::Tensor(base.to_owned(), factor.map(f64::to_bits))), term.zip(adapter)),
            None => (None, None),
        };
        let rows = self.once(key, |loader| loader.whole(name, term.is_some(), factor))?;
        self.count(name, None);
        let added = term.map(|(term, adapter)| RowFactors::load(self, name, term, factor.unwrap_or(1.0), adapter)).transpose()?;
        Ok(Table { rows, added, ops })
    }

    /// The values of a tensor, in float32, on the host.
    pub fn host(&mut self, name: &str) -> std::result::Result<Vec<f32>, LoadError> {
        let values = self.own.whole(name)?;
        self.count(name, None);
        Ok(values)
    }

    /// Some elements of a tensor, in float32, on the host.
    pub fn part(&mut self, name: &str, range: Range<usize>) -> std::result::Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; range.len()];
        self.own.read(name, range.start, &mut values)?;
        self.count(name, Some(range.len()));
        Ok(values)
    }

    /// A norm's weight, on the host.
    pub fn norm_weight(&mut self, keys: &NormKeys) -> std::result::Result<Vec<f32>, LoadError> {
        let mut weight = self.host(&keys.weight)?;
        if keys.from_one {
            for weight in &mut weight {
                *weight += 1.0;
            }
        }
        Ok(weight)
    }

    pub fn norm(&mut self, keys: &NormKeys) -> std::result::Result<NormWeights, LoadError> {
        let key = |loader: &Self, name: &str, from_one| loader.untouched(name).map(|base| Key::Norm(base, from_one));
        let place = |loader: &mut Self, values: Vec<f32>| {
            let width = values.len();
            loader.place(values, &[width], DType::F32)
        };
        let bias = match &keys.bias {
            None => None,
            Some(bias) => Some(self.once(key(self, bias, false), |loader| loader.host(bias).and_then(|bias| place(loader, bias)))?),
        };
        let key = key(self, &keys.weight, keys.from_one);
        let weight = self.once(key, |loader| loader.norm_weight(keys).and_then(|weight| place(loader, weight)))?;
        Ok(NormWeights { weight, bias, ops: self.backend.ops })
    }

    pub fn optional_norm(&mut self, keys: Option<&NormKeys>) -> std::result::Result<Option<NormWeights>, LoadError> {
        keys.map(|keys| self.norm(keys)).transpose()
    }

    /// Linear layers of one input as one product, their outputs side by side.
    pub fn fused(&mut self, parts: &[&LinearKeys]) -> std::result::Result<Linear, LoadError> {
        let (ops, weights) = (self.backend.ops, self.backend.weights);
        let parts = joined(parts);
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        let padded = padded_outputs(ops, outputs);
        let origins = self.origins();
        let shared = origins.and_then(|origins| origins.product(&parts));
        let (key, added) = shared.map(|SharedProduct { keys, added }| (Key::Matrix(keys), added)).unzip();
        let bare = added.is_some();
        let weight = self.once(key, |loader| {
            let mut read = |reader: &mut Reader<'a>, room: &mut Room| parts.iter().try_for_each(|part| reader.put_matrix(part, room));
            Ok(ops.weight(&loader.placed(&[padded, inputs], bare, &mut read)?)?)
        })?;
        let bias = if parts.iter().any(|part| part.bias.is_some()) {
            let key = origins.and_then(|origins| origins.bias(&parts));
            Some(self.once(key, |loader| {
                let mut bias = vec![0.0; outputs];
                let mut rest = bias.as_mut_slice();
                for part in &parts {
                    let (this, next) = rest.split_at_mut(part.outputs);
                    if let Some(name) = &part.bias {
                        loader.own.rows(name, part.rows, 1, this)?;
                    }
                    rest = next;
                }
                loader.place(bias, &[outputs], weights)
            })?)
        } else {
            None
        };
        for part in &parts {
            self.count(&part.weight, Some(part.outputs * inputs));
            part.bias.iter().for_each(|bias| self.count(bias, Some(part.outputs)));
        }
        let added = match (added, origins.and_then(|origins| origins.adapter)) {
            (Some(added), Some(adapter)) => Factors::load(self, &parts, &added, adapter)?,
            _ => None,
        };
        Ok(Linear { weight, bias, added, outputs, ops, fixed_rows: self.backend.fixed_rows })
    }

    /// A whole tensor on the device, with every element multiplied.
    fn whole(&mut self, name: &str, bare: bool, factor: Option<f64>) -> std::result::Result<Tensor, LoadError> {
        self.placed(&self.shape(name), bare, &mut |reader, room| reader.put_whole(name, factor.map(|factor| factor as f32), room))
    }

    /// A tensor of which `read` puts every element, in order, read without what an adapter adds if `bare` is wanted and there
    /// is a base. What is not put is zero.
    fn placed(&mut self, shape: &[usize], bare: bool, read: Read<'_, 'a>) -> std::result::Result<Tensor, LoadError> {
        let (dtype, elements) = (self.backend.weights, shape.iter().product());
        let Self { own, apart, placer, backend, .. } = self;
        let reader = match apart {
            Some((_, reader)) if bare => reader,
            _ => own,
        };
        // Where the host's memory is the model's it is filled in place.
        let mut room = match (backend.ops, placer) {
            (Ops::Kernels, _) => Room::here(elements),
            (Ops::Plain, Some(placer)) => Room::Device(placer.begin(elements, dtype)?),
            (Ops::Plain, none) => {
                let placer = none.insert(Placer::onto(backend).map_err(candle_core::Error::wrap)?);
                Room::Device(placer.begin(elements, dtype)?)
            }
        };
        read(reader, &mut room)?;
        match room {
            Room::Here { values, .. } => self.place(values, shape, dtype),
            Room::Device(filling) => {
                let tensor = filling.end(shape)?;
                self.device_bytes += (elements * dtype.size_in_bytes()) as u64;
                Ok(tensor)
            }
        }
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.own.info(name).map(|info| info.shape.clone()).unwrap_or_default()
    }

    /// Waits until all that was asked for is on the device. Before that nobody may compute with it.
    pub fn settle(&self) -> std::result::Result<(), LoadError> {
        Ok(self.placer.as_ref().map_or(Ok(()), Placer::settle)?)
    }

    /// The base's name for a tensor that is the base's as it is, where there is a base.
    fn untouched(&self, name: &str) -> Option<String> {
        self.origins().and_then(|origins| origins.untouched(name)).map(str::to_owned)
    }

    fn origins(&self) -> Option<Origins<'a>> {
        self.apart.as_ref().map(|(apart, _)| apart.origins)
    }

    /// Places what has a key once for all models of its base.
    fn once(
        &mut self,
        key: Option<Key>,
        place: impl FnOnce(&mut Self) -> std::result::Result<Tensor, LoadError>,
    ) -> std::result::Result<Tensor, LoadError> {
        let base = self.apart.as_ref().map(|(apart, _)| apart.base);
        let Some((key, base)) = key.zip(base) else { return place(self) };
        if let Some(there) = base.find(&key) {
            return Ok(there);
        }
        let placed = place(self)?;
        base.keep(key, &placed);
        Ok(placed)
    }

    /// What is small, or made here.
    pub fn place(&mut self, values: Vec<f32>, shape: &[usize], dtype: DType) -> std::result::Result<Tensor, LoadError> {
        self.device_bytes += (values.len() * dtype.size_in_bytes()) as u64;
        Ok(placed(values, shape, dtype, &self.backend.device)?)
    }

    /// Elements of a tensor that the model has now; `None` for all.
    fn count(&mut self, name: &str, elements: Option<usize>) {
        let Some(info) = self.own.info(name) else { return };
        let elements = elements.unwrap_or(info.elements());
        self.parameters += elements as u64;
        self.done += (elements * info.dtype.size()) as u64;
        (self.progress)(self.done, self.total);
    }
}

/// Rows of a matrix on the device, with the padding that its products need.
pub fn padded_outputs(ops: Ops, outputs: usize) -> usize {
    if ops == Ops::Kernels { outputs.max(MIN_OUTPUTS) } else { outputs }
}

/// Layers whose rows follow each other in one tensor, as the one layer that they are: it is then read once.
pub fn joined(parts: &[&LinearKeys]) -> Vec<LinearKeys> {
    let mut joined: Vec<LinearKeys> = Vec::with_capacity(parts.len());
    for part in parts {
        match joined.last_mut() {
            Some(last) if last.weight == part.weight && follows(last, part) => {
                last.outputs += part.outputs;
                last.rows = Rows { run: last.outputs, ..last.rows };
            }
            _ => joined.push((*part).clone()),
        }
    }
    joined
}

/// Whether both are one run of rows, the second behind the first.
fn follows(first: &LinearKeys, second: &LinearKeys) -> bool {
    let one_run = |keys: &LinearKeys| keys.rows.run == keys.outputs;
    one_run(first) && one_run(second) && first.rows.first + first.outputs == second.rows.first
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Dtype, Elements, Manifest, SourceError, TensorInfo};

    /// One matrix that counts up from 0, row by row.
    struct Counting(Manifest);

    impl TensorSource for Counting {
        fn manifest(&self) -> &Manifest {
            &self.0
        }

        fn read(&self, _: &str, range: std::ops::Range<usize>, into: &mut Elements) -> std::result::Result<(), SourceError> {
            *into = Elements::F32(range.map(|index| index as f32).collect());
            Ok(())
        }
    }

    fn keys(outputs: usize, rows: Rows, transposed: Option<usize>) -> LinearKeys {
        LinearKeys { weight: "w".to_owned(), bias: Some("w".to_owned()), inputs: 2, outputs, rows, transposed }
    }

    /// The first rows of the fused weight, its bias, and how many elements were read.
    fn fused(stored: [usize; 2], parts: &[&LinearKeys]) -> (Vec<f32>, Vec<f32>, u64) {
        let info = TensorInfo { dtype: Dtype::F32, shape: stored.to_vec() };
        let source = Counting([("w".to_owned(), info)].into_iter().collect());
        let mut progress = |_, _| {};
        let used = ["w".to_owned()];
        let backend = Backend::cpu();
        let mut loader = Loader::new(&source, None, &used, &backend, &mut progress);
        let linear = loader.fused(parts).expect("loads");
        let weight = linear.weight.t().expect("turned").narrow(0, 0, linear.outputs).expect("rows");
        let flat = |tensor: &Tensor| tensor.flatten_all().expect("flat").to_vec1().expect("values");
        (flat(&weight), linear.bias.as_ref().map(flat).unwrap_or_default(), loader.parameters)
    }

    #[test]
    fn rows_of_a_fused_matrix_are_taken_in_runs() {
        let (weight, bias, _) = fused([6, 2], &[&keys(4, Rows { first: 1, run: 2, stride: 3 }, None)]);
        assert_eq!(weight, [2., 3., 4., 5., 8., 9., 10., 11.]);
        assert_eq!(bias, [1., 2., 4., 5.]);
    }

    #[test]
    fn a_matrix_with_inputs_in_rows_is_turned_round() {
        let (weight, bias, _) = fused([2, 3], &[&keys(2, Rows { first: 1, run: 2, stride: 0 }, Some(3))]);
        assert_eq!(weight, [1., 4., 2., 5.]);
        assert_eq!(bias, [1., 2.]);
    }

    #[test]
    fn layers_that_follow_each_other_in_one_tensor_are_read_once() {
        let [first, second] = [0, 1].map(|first| keys(1 + first, Rows { first, run: 1 + first, stride: 0 }, Some(3)));
        let (weight, bias, read) = fused([2, 3], &[&first, &second]);
        assert_eq!(weight, [0., 3., 1., 4., 2., 5.]);
        assert_eq!(bias, [0., 1., 2.]);
        assert_eq!(read, 6 + 3);
    }
}
