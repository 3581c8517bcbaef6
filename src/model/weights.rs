//! A tensor source to tensors on a device: pulled chunk by chunk, widened to float32, fused where the forward pass
//! multiplies by several matrices at once.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::LoadError;
use crate::checkpoint::{CHUNK_ELEMENTS, Elements, LinearKeys, NormKeys, TensorSource};

/// Fewest outputs of a matrix product. Crate gemm computes a narrower product in an order of additions that depends on
/// the number of rows; zero outputs beside the real ones cost less than a score that depends on its company.
const MIN_OUTPUTS: usize = 80;

/// `y = x W^T (+ b)`, several layers of the checkpoint in one.
#[derive(Debug)]
pub struct Linear {
    /// `[inputs, outputs + padding]` as a view of the stored `[outputs + padding, inputs]`.
    weight: Tensor,
    pub bias: Option<Tensor>,
    pub outputs: usize,
}

impl Linear {
    /// `[rows, inputs]` to `[rows, at least outputs]`; the columns behind `outputs` are zero. The bias is left to the
    /// caller, who knows what else passes over the rows.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight)
    }
}

/// The norm's weight and bias on the device.
#[derive(Debug)]
pub struct NormWeights {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// Reads tensors of one source onto one device, and counts what it read.
pub struct Loader<'a> {
    source: &'a dyn TensorSource,
    device: &'a Device,
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
    pub fn new(source: &'a dyn TensorSource, used: &[String], device: &'a Device, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        let size = |name: &String| source.manifest().get(name).map_or(0, |info| (info.elements() * info.dtype.size()) as u64);
        let total = used.iter().map(size).sum();
        Self { source, device, progress, total, done: 0, buffer: Elements::default(), parameters: 0, device_bytes: 0 }
    }

    /// A tensor as it is stored.
    pub fn tensor(&mut self, name: &str) -> Result<Tensor, LoadError> {
        let shape = self.source.manifest().get(name).map(|info| info.shape.clone()).unwrap_or_default();
        let values = self.host(name)?;
        self.place(values, &shape)
    }

    /// The values of a tensor, in float32, on the host.
    pub fn host(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; self.source.manifest().get(name).map_or(0, |info| info.elements())];
        self.read(name, &mut values)?;
        Ok(values)
    }

    /// Some elements of a tensor, in float32, on the host.
    pub fn part(&mut self, name: &str, range: Range<usize>) -> Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; range.len()];
        self.read_from(name, range.start, &mut values)?;
        Ok(values)
    }

    pub fn norm(&mut self, keys: &NormKeys) -> Result<NormWeights, LoadError> {
        let bias = keys.bias.as_deref().map(|bias| self.tensor(bias)).transpose()?;
        Ok(NormWeights { weight: self.tensor(&keys.weight)?, bias })
    }

    pub fn optional_norm(&mut self, keys: Option<&NormKeys>) -> Result<Option<NormWeights>, LoadError> {
        keys.map(|keys| self.norm(keys)).transpose()
    }

    /// Linear layers of one input as one product, their outputs side by side.
    pub fn fused(&mut self, parts: &[&LinearKeys]) -> Result<Linear, LoadError> {
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        let padded = outputs.max(MIN_OUTPUTS);
        let mut weight = vec![0.0; padded * inputs];
        let mut bias = vec![0.0; outputs];
        let mut first = 0;
        for part in parts {
            self.read(&part.weight, &mut weight[first * inputs..(first + part.outputs) * inputs])?;
            if let Some(name) = &part.bias {
                self.read(name, &mut bias[first..first + part.outputs])?;
            }
            first += part.outputs;
        }
        let bias = if parts.iter().any(|part| part.bias.is_some()) { Some(self.place(bias, &[outputs])?) } else { None };
        let weight = self.place(weight, &[padded, inputs])?.t()?;
        Ok(Linear { weight, bias, outputs })
    }

    fn place(&mut self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor, LoadError> {
        self.device_bytes += (values.len() * size_of::<f32>()) as u64;
        Ok(Tensor::from_vec(values, shape, self.device)?)
    }

    fn read(&mut self, name: &str, into: &mut [f32]) -> Result<(), LoadError> {
        self.read_from(name, 0, into)
    }

    fn read_from(&mut self, name: &str, first: usize, into: &mut [f32]) -> Result<(), LoadError> {
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

/// Any floating-point elements to float32. Exact but for float64, which is rounded once.
fn widen(from: &Elements, into: &mut [f32]) -> Result<(), String> {
    fn copy<T: Copy>(from: &[T], into: &mut [f32], widen: impl Fn(T) -> f32) -> Result<(), String> {
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
