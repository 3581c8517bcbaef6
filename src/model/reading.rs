//! Elements of a tensor source, widened to float32, chunk by chunk.

use std::ops::Range;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::LoadError;
use super::placing::Room;
use crate::checkpoint::{CHUNK_ELEMENTS, Elements, LinearKeys, Rows, TensorInfo, TensorSource};

/// Reads one source, through one buffer.
pub struct Reader<'a> {
    source: &'a dyn TensorSource,
    buffer: Elements,
}

impl<'a> Reader<'a> {
    pub fn new(source: &'a dyn TensorSource) -> Self {
        Self { source, buffer: Elements::default() }
    }

    pub fn info(&self, name: &str) -> Option<&'a TensorInfo> {
        self.source.manifest().get(name)
    }

    /// A whole tensor.
    pub fn whole(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; self.info(name).map_or(0, TensorInfo::elements)];
        self.read(name, 0, &mut values)?;
        Ok(values)
    }

    /// Every element of a tensor, multiplied.
    pub fn put_whole(&mut self, name: &str, factor: Option<f32>, room: &mut Room) -> Result<(), LoadError> {
        let all = Rows { first: 0, run: usize::MAX, stride: 0 };
        for stretch in stretches(all, self.info(name).map_or(0, TensorInfo::elements), 1) {
            let into = room.next(stretch.len())?;
            self.read(name, stretch.start, into)?;
            if let Some(factor) = factor {
                into.iter_mut().for_each(|value| *value *= factor);
            }
        }
        Ok(())
    }

    /// `[outputs, inputs]` of a layer, as it is stored or turned round.
    pub fn put_matrix(&mut self, part: &LinearKeys, room: &mut Room) -> Result<(), LoadError> {
        let Some(columns) = part.transposed else {
            for stretch in stretches(part.rows, part.outputs, part.inputs) {
                self.read(&part.weight, stretch.start, room.next(stretch.len())?)?;
            }
            return Ok(());
        };
        let into = room.next(part.outputs * part.inputs)?;
        let inputs = part.inputs;
        let places: Vec<usize> = places(part.rows, part.outputs).collect();
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
    pub fn rows(&mut self, name: &str, rows: Rows, width: usize, into: &mut [f32]) -> Result<(), LoadError> {
        let mut rest = into;
        for (first, run) in runs(rows, rest.len() / width.max(1)) {
            let (this, next) = rest.split_at_mut(run * width);
            self.read(name, first * width, this)?;
            rest = next;
        }
        Ok(())
    }

    /// Elements of a tensor from `first` on.
    pub fn read(&mut self, name: &str, first: usize, into: &mut [f32]) -> Result<(), LoadError> {
        for (chunk, into) in into.chunks_mut(CHUNK_ELEMENTS).enumerate() {
            let start = first + chunk * CHUNK_ELEMENTS;
            self.source.read(name, start..start + into.len(), &mut self.buffer)?;
            widen(&self.buffer, into).map_err(|found| LoadError::Tensor {
                tensor: name.to_owned(),
                problem: format!("expected {} floating-point numbers, found {found}", into.len()),
            })?;
        }
        Ok(())
    }
}

/// Where the elements of so many rows of a stored matrix are, one stretch after another, each as long as a read may be.
fn stretches(rows: Rows, count: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    runs(rows, count).flat_map(move |(first, run)| {
        let all = first * width..(first + run) * width;
        all.clone().step_by(CHUNK_ELEMENTS).map(move |start| start..all.end.min(start + CHUNK_ELEMENTS))
    })
}

/// The runs of so many rows: where each begins, and how long it is.
fn runs(rows: Rows, count: usize) -> impl Iterator<Item = (usize, usize)> {
    let run = rows.run.max(1);
    (0..count.div_ceil(run)).map(move |index| (rows.first + index * rows.stride, run.min(count - index * run)))
}

/// Where so many rows stand, one by one.
pub fn places(rows: Rows, count: usize) -> impl Iterator<Item = usize> {
    runs(rows, count).flat_map(|(first, run)| first..first + run)
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

/// A tensor on the device, rounded here, so that no more bytes than those that stay travel there.
pub fn placed(values: Vec<f32>, shape: &[usize], dtype: DType, device: &Device) -> CandleResult<Tensor> {
    match dtype {
        DType::BF16 => Tensor::from_vec(values.par_iter().map(|value| bf16::from_f32(*value)).collect::<Vec<_>>(), shape, device),
        DType::F16 => Tensor::from_vec(values.par_iter().map(|value| f16::from_f32(*value)).collect::<Vec<_>>(), shape, device),
        _ => Tensor::from_vec(values, shape, device),
    }
}
