//! A tensor source to tensors on a device: pulled chunk by chunk, widened to float32, fused where the forward pass
//! multiplies by several matrices at once, and rounded to what the device multiplies in.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::LoadError;
use super::device::Backend;
use super::ops::Ops;
use crate::checkpoint::{CHUNK_ELEMENTS, Elements, LinearKeys, Norm, NormKeys, Rows, TensorSource};

/// Fewest outputs of a matrix product. Crate gemm computes a narrower product in an order of additions that depends on
/// the number of rows; zero outputs beside the real ones cost less than a score that depends on its company.
const MIN_OUTPUTS: usize = 80;

/// `y = x W^T (+ b)`, several layers of the checkpoint in one.
#[derive(Debug)]
pub struct Linear {
    /// `[inputs, outputs + padding]` as a view of the stored `[outputs + padding, inputs]`.
    weight: Tensor,
    bias: Option<Tensor>,
    outputs: usize,
    ops: Ops,
}

impl Linear {
    /// `[rows, inputs]` to `[rows, at least outputs]`; the columns behind `outputs` are zero.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(self.weight.dtype())?.matmul(&self.weight)
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
    pub fn on(&self, device: &Device) -> Result<Self> {
        // A view of the other orientation keeps the stored one whole.
        let weight = self.weight.t()?.to_device(device)?.t()?;
        Ok(Self { weight, bias: on(self.bias.as_ref(), device)?, outputs: self.outputs, ops: self.ops })
    }
}

/// A tensor, where there is one, on another device.
pub fn on(tensor: Option<&Tensor>, device: &Device) -> Result<Option<Tensor>> {
    tensor.map(|tensor| tensor.to_device(device)).transpose()
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
    pub fn on(&self, device: &Device) -> Result<Self> {
        Ok(Self { weight: self.weight.to_device(device)?, bias: on(self.bias.as_ref(), device)?, ops: self.ops })
    }
}

/// Reads tensors of one source onto one device, and counts what it read.
pub struct Loader<'a> {
    source: &'a dyn TensorSource,
    backend: &'a Backend,
    progress: &'a mut dyn FnMut(u64, u64),
    total: u64,
    done: u64,
    buffer: Elements,
    /// Elements read: the parameters of the model.
    pub parameters: u64,
    /// Bytes that the tensors take on the device.
    pub device_bytes: u64,
}

impl<'a> Loader<'a> {
    pub fn new(source: &'a dyn TensorSource, used: &[String], backend: &'a Backend, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        let size = |name: &String| source.manifest().get(name).map_or(0, |info| (info.elements() * info.dtype.size()) as u64);
        let total = used.iter().map(size).sum();
        Self { source, backend, progress, total, done: 0, buffer: Elements::default(), parameters: 0, device_bytes: 0 }
    }

    pub fn backend(&self) -> &'a Backend {
        self.backend
    }

    /// A tensor in its own shape.
    pub fn tensor(&mut self, name: &str) -> std::result::Result<Tensor, LoadError> {
        let shape = self.source.manifest().get(name).map(|info| info.shape.clone()).unwrap_or_default();
        let values = self.host(name)?;
        self.place(values, &shape, self.backend.weights)
    }

    /// The values of a tensor, in float32, on the host.
    pub fn host(&mut self, name: &str) -> std::result::Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; self.source.manifest().get(name).map_or(0, |info| info.elements())];
        self.read(name, 0, &mut values)?;
        Ok(values)
    }

    /// Some elements of a tensor, in float32, on the host.
    pub fn part(&mut self, name: &str, range: Range<usize>) -> std::result::Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; range.len()];
        self.read(name, range.start, &mut values)?;
        Ok(values)
    }

    /// A tensor with every element multiplied by a factor.
    pub fn scaled(&mut self, name: &str, factor: Option<f64>) -> std::result::Result<Tensor, LoadError> {
        let Some(factor) = factor else { return self.tensor(name) };
        let shape = self.source.manifest().get(name).map(|info| info.shape.clone()).unwrap_or_default();
        let mut values = self.host(name)?;
        for value in &mut values {
            *value *= factor as f32;
        }
        self.place(values, &shape, self.backend.weights)
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
        let bias = keys.bias.as_deref().map(|bias| self.host(bias)).transpose()?;
        let weight = self.norm_weight(keys)?;
        let width = weight.len();
        let bias = bias.map(|bias| self.place(bias, &[width], DType::F32)).transpose()?;
        Ok(NormWeights { weight: self.place(weight, &[width], DType::F32)?, bias, ops: self.backend.ops })
    }

    pub fn optional_norm(&mut self, keys: Option<&NormKeys>) -> std::result::Result<Option<NormWeights>, LoadError> {
        keys.map(|keys| self.norm(keys)).transpose()
    }

    /// Linear layers of one input as one product, their outputs side by side.
    pub fn fused(&mut self, parts: &[&LinearKeys]) -> std::result::Result<Linear, LoadError> {
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        let padded = if self.backend.ops == Ops::Kernels { outputs.max(MIN_OUTPUTS) } else { outputs };
        let mut weight = vec![0.0; padded * inputs];
        let mut bias = vec![0.0; outputs];
        let mut first = 0;
        for part in joined(parts) {
            let end = first + part.outputs;
            self.matrix(&part, &mut weight[first * inputs..end * inputs])?;
            if let Some(name) = &part.bias {
                self.rows(name, part.rows, 1, &mut bias[first..end])?;
            }
            first = end;
        }
        let bias =
            if parts.iter().any(|part| part.bias.is_some()) { Some(self.place(bias, &[outputs], self.backend.weights)?) } else { None };
        let weight = self.place(weight, &[padded, inputs], self.backend.weights)?.t()?;
        Ok(Linear { weight, bias, outputs, ops: self.backend.ops })
    }

    /// `[outputs, inputs]` of a layer, as it is stored or turned round.
    fn matrix(&mut self, part: &LinearKeys, into: &mut [f32]) -> std::result::Result<(), LoadError> {
        let Some(columns) = part.transposed else {
            return self.rows(&part.weight, part.rows, part.inputs, into);
        };
        let inputs = part.inputs;
        let places: Vec<usize> = runs(part.rows, part.outputs).flat_map(|(first, run)| first..first + run).collect();
        let step = (CHUNK_ELEMENTS / columns).max(1);
        let mut chunk = vec![0.0; step.min(inputs) * columns];
        for first in (0..inputs).step_by(step) {
            let count = step.min(inputs - first);
            let chunk = &mut chunk[..count * columns];
            self.read(&part.weight, first * columns, chunk)?;
            for (row, stored) in chunk.chunks_exact(columns).enumerate() {
                for (output, place) in places.iter().enumerate() {
                    into[output * inputs + first + row] = stored[*place];
                }
            }
        }
        Ok(())
    }

    /// Rows of a stored matrix, one after the other.
    fn rows(&mut self, name: &str, rows: Rows, width: usize, into: &mut [f32]) -> std::result::Result<(), LoadError> {
        let mut rest = into;
        for (first, run) in runs(rows, rest.len() / width.max(1)) {
            let (this, next) = rest.split_at_mut(run * width);
            self.read(name, first * width, this)?;
            rest = next;
        }
        Ok(())
    }

    /// The host's copy is gone when this returns: one tensor at a time is all that loading holds beside the device.
    pub fn place(&mut self, values: Vec<f32>, shape: &[usize], dtype: DType) -> std::result::Result<Tensor, LoadError> {
        self.device_bytes += (values.len() * dtype.size_in_bytes()) as u64;
        let device = &self.backend.device;
        // Rounded here, so that no more bytes than those that stay travel to the device.
        Ok(match dtype {
            DType::BF16 => Tensor::from_vec(values.par_iter().map(|value| bf16::from_f32(*value)).collect::<Vec<_>>(), shape, device)?,
            DType::F16 => Tensor::from_vec(values.par_iter().map(|value| f16::from_f32(*value)).collect::<Vec<_>>(), shape, device)?,
            _ => Tensor::from_vec(values, shape, device)?,
        })
    }

    /// Elements of a tensor from `first` on.
    fn read(&mut self, name: &str, first: usize, into: &mut [f32]) -> std::result::Result<(), LoadError> {
        let total = into.len();
        for (chunk, into) in into.chunks_mut(CHUNK_ELEMENTS).enumerate() {
            let start = first + chunk * CHUNK_ELEMENTS;
            self.source.read(name, start..start + into.len(), &mut self.buffer)?;
            widen(&self.buffer, into).map_err(|found| LoadError::Tensor {
                tensor: name.to_owned(),
                problem: format!("expected {} floating-point numbers, found {found}", into.len()),
            })?;
        }
        self.parameters += total as u64;
        self.done += self.source.manifest().get(name).map_or(0, |info| (total * info.dtype.size()) as u64);
        (self.progress)(self.done, self.total);
        Ok(())
    }
}

/// The runs of so many rows: where each begins, and how long it is.
fn runs(rows: Rows, count: usize) -> impl Iterator<Item = (usize, usize)> {
    let run = rows.run.max(1);
    (0..count.div_ceil(run)).map(move |index| (rows.first + index * rows.stride, run.min(count - index * run)))
}

/// Layers whose rows follow each other in one tensor, as the one layer that they are: it is then read once.
fn joined(parts: &[&LinearKeys]) -> Vec<LinearKeys> {
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

/// Any floating-point elements to float32. Exact but for float64, which is rounded once.
fn widen(from: &Elements, into: &mut [f32]) -> std::result::Result<(), String> {
    fn copy<T: Copy>(from: &[T], into: &mut [f32], widen: impl Fn(T) -> f32) -> std::result::Result<(), String> {
        if from.len() != into.len() {
            return Err(format!("{} of them", from.len()));
        }
        for (into, from) in into.iter_mut().zip(from) {
            *into = widen(*from);
        }
        Ok(())
    }
    match from {
        Elements::F32(values) => copy(values, into, |value| value),
        Elements::F64(values) => copy(values, into, |value| value as f32),
        Elements::F16(values) => copy(values, into, half::f16::to_f32),
        Elements::Bf16(values) => copy(values, into, half::bf16::to_f32),
        Elements::I64(_) | Elements::I32(_) | Elements::I16(_) | Elements::Bytes(_) => Err("integers".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Dtype, Manifest, SourceError, TensorInfo};

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
        let mut loader = Loader::new(&source, &used, &backend, &mut progress);
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
