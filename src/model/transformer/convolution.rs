//! The convolution beside DeBERTa v2's first layer.

use candle_core::{Device, Result, Tensor};

use super::super::LoadError;
use super::super::apart::Destination;
use super::super::ops::Ops;
use super::super::pack::Pack;
use super::super::weights::{Linear, Loader, NormWeights};
use crate::checkpoint::{self, Architecture, Layout};

#[derive(Debug)]
pub struct Convolution {
    kind: checkpoint::Convolution,
    linear: Linear,
    norm: NormWeights,
    ops: Ops,
}

impl Convolution {
    pub fn load(architecture: &Architecture, layout: &Layout, loader: &mut Loader) -> std::result::Result<Option<Self>, LoadError> {
        let (Some(kind), Some(keys)) = (architecture.convolution, &layout.convolution) else { return Ok(None) };
        Ok(Some(Self { kind, linear: loader.fused(&[&keys.linear])?, norm: loader.norm(&keys.norm)?, ops: loader.backend().ops }))
    }

    /// The same on another device.
    pub fn on(&self, to: Destination) -> Result<Self> {
        Ok(Self { kind: self.kind, linear: self.linear.on(to)?, norm: self.norm.on(to)?, ops: self.ops })
    }

    /// The rows that each row of the pack sees, on the device.
    pub fn windows(&self, pack: &Pack, device: &Device) -> Result<Tensor> {
        Tensor::new(windows(pack, pack.ids().len(), self.kind.kernel), device)
    }

    /// The activated convolution of the embeddings `x`, every sample by itself: a product of each token's window.
    pub fn of(&self, x: &Tensor, windows: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let kernel = self.kind.kernel;
        // A row of zeros stands beyond the ends of a sample.
        let padded = x.pad_with_zeros(0, 0, 1)?;
        let windows = padded.index_select(windows, 0)?.reshape((rows, kernel, width))?;
        let convolved = self.linear.forward_biased(&windows.transpose(1, 2)?.contiguous()?.reshape((rows, width * kernel))?)?;
        self.ops.activate(self.kind.activation, convolved)
    }

    /// What the first layer gave, with the convolution, normed.
    pub fn join(&self, architecture: &Architecture, x: Tensor, convolved: &Tensor) -> Result<Tensor> {
        self.norm.apply(architecture.norm, &self.ops.add(x, convolved)?)
    }
}

/// The rows that each of `rows` rows sees, `kernel` for each, in order: its own in the middle, and row number `rows` beyond
/// the ends of its sample.
fn windows(pack: &Pack, rows: usize, kernel: usize) -> Vec<u32> {
    let mut windows = vec![rows as u32; rows * kernel];
    for sample in 0..pack.len() {
        let own: Vec<usize> = pack.path(pack.leaf(sample)).into_iter().flatten().collect();
        for (place, row) in own.iter().enumerate() {
            for (tap, seen) in windows[row * kernel..(row + 1) * kernel].iter_mut().enumerate() {
                let neighbour = (place + tap).checked_sub(kernel / 2).and_then(|neighbour| own.get(neighbour));
                if let Some(neighbour) = neighbour {
                    *seen = *neighbour as u32;
                }
            }
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::text::Encoding;

    #[test]
    fn a_window_ends_where_its_sample_does() {
        let encodings = [vec![5, 6, 7], vec![8], vec![9, 10]].map(|ids| Arc::new(Encoding::for_test(ids)));
        let pack = Pack::new(&encodings);
        let rows = pack.ids().len();
        let none = rows as u32;
        let expected = [[none, 0, 1], [0, 1, 2], [1, 2, none], [none, 3, none], [none, 4, 5], [4, 5, none]];
        let found = windows(&pack, rows, 3);
        assert_eq!(found[..expected.as_flattened().len()], *expected.as_flattened());
        assert_eq!(windows(&pack, rows, 1)[..6], [0, 1, 2, 3, 4, 5]);
    }
}
