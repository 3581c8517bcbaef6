//! Our kernels as operations on candle's tensors, on the host in float32.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Shape, bail};

use super::Heads;
use crate::checkpoint::{Activation, Norm};
use crate::model::kernels::attention::Shape as AttentionShape;
use crate::model::kernels::distances::Distances;
use crate::model::kernels::low_rank::{Factor, Rows};
use crate::model::kernels::{activation, attention, linear, low_rank, norm, rope, turn};
use crate::model::pack::Pack;
use crate::model::prefixes::Memory;

/// A matrix of a storage: its rows, how far apart they are, and how many.
fn rows<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<(&'a [f32], usize, usize)> {
    let values = storage.as_slice::<f32>()?;
    let (count, stride) = shape_of(layout)?;
    Ok((&values[layout.start_offset()..], stride, count))
}

fn rows_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<(&'a mut [f32], usize)> {
    let (count, stride) = shape_of(layout)?;
    if layout.start_offset() != 0 || stride != layout.dims()[1] {
        bail!("expected whole contiguous rows, found {layout:?}");
    }
    match storage {
        CpuStorage::F32(values) => Ok((&mut values[..count * stride], stride)),
        _ => bail!("expected float32"),
    }
}

fn shape_of(layout: &Layout) -> Result<(usize, usize)> {
    match (layout.dims(), layout.stride()) {
        (&[count, _], &[stride, 1]) => Ok((count, stride)),
        _ => bail!("expected a matrix with contiguous rows, found {layout:?}"),
    }
}

fn vector<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("expected numbers in one piece, found {layout:?}"),
    }
}

pub(super) struct NormOp(pub Norm);

impl NormOp {
    fn run(&self, x: (&CpuStorage, &Layout), weight: &[f32], bias: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let (values, stride, count) = rows(x.0, x.1)?;
        let mut output = vec![0.0; count * weight.len()];
        norm::normalise(self.0, values, stride, weight, bias, &mut output);
        Ok((CpuStorage::F32(output), (count, weight.len()).into()))
    }
}

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((s1, l1), vector(s2, l2)?, None)
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run((s1, l1), vector(s2, l2)?, Some(vector(s3, l3)?))
    }
}

pub(super) struct AddRows;

impl InplaceOp2 for AddRows {
    fn name(&self) -> &'static str {
        "add_rows"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (y, y_stride, _) = rows(s2, l2)?;
        let (x, width) = rows_mut(s1, l1)?;
        linear::add_rows(x, width, y, y_stride);
        Ok(())
    }
}

pub(super) struct Overwrite {
    pub first: usize,
}

impl InplaceOp2 for Overwrite {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let part = vector(s2, l2)?;
        let (x, width) = rows_mut(s1, l1)?;
        match x.get_mut(self.first * width..self.first * width + part.len()) {
            Some(rows) if part.len().is_multiple_of(width) => rows.copy_from_slice(part),
            _ => bail!("expected whole rows within {l1:?} from row {}, found {l2:?}", self.first),
        }
        Ok(())
    }
}

pub(super) struct ScatterAdd<'a> {
    pub rows: &'a [u32],
    pub weights: &'a [f32],
}

impl InplaceOp2 for ScatterAdd<'_> {
    fn name(&self) -> &'static str {
        "scatter_add"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (y, y_stride, _) = rows(s2, l2)?;
        let (x, width) = rows_mut(s1, l1)?;
        linear::scatter_add(x, width, y, y_stride, self.rows, self.weights);
        Ok(())
    }
}

pub(super) struct AddBias;

impl InplaceOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (x, stride) = rows_mut(s1, l1)?;
        linear::add_bias(x, stride, vector(s2, l2)?);
        Ok(())
    }
}

pub(super) struct Turn;

impl CustomOp1 for Turn {
    fn name(&self) -> &'static str {
        "turn"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (count, columns) = layout.shape().dims2()?;
        let turned = turn::turned(vector(storage, layout)?, columns);
        Ok((CpuStorage::F32(turned), (columns, count).into()))
    }
}

pub(super) struct Project;

impl CustomOp2 for Project {
    fn name(&self) -> &'static str {
        "project"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, stride, count) = rows(s1, l1)?;
        let factor = factor(s2, l2)?;
        let output = low_rank::project(Rows { values: x, stride }, count, factor);
        Ok((CpuStorage::F32(output), (count, factor.width).into()))
    }
}

pub(super) struct AddProduct {
    pub first: usize,
    pub columns: usize,
}

impl InplaceOp3 for AddProduct {
    fn name(&self) -> &'static str {
        "add_product"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout, s3: &CpuStorage, l3: &Layout) -> Result<()> {
        let (x, x_stride, _) = rows(s2, l2)?;
        let (y, stride) = rows_mut(s1, l1)?;
        low_rank::add(Rows { values: x, stride: x_stride }, factor(s3, l3)?, y, stride, self.first, self.columns);
        Ok(())
    }
}

/// A factor, which is stored as the kernels read it.
fn factor<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Factor<'a>> {
    let (values, width, depth) = rows(storage, layout)?;
    match values.get(..depth * width) {
        Some(values) if layout.is_contiguous() => Ok(Factor { values, width }),
        _ => bail!("expected a contiguous factor, found {layout:?}"),
    }
}

pub(super) struct Activate(pub Activation);

impl InplaceOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (x, width) = rows_mut(storage, layout)?;
        activation::activate(self.0, x, width);
        Ok(())
    }
}

pub(super) struct Gate {
    pub kind: Activation,
    pub width: usize,
}

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (values, stride, count) = rows(storage, layout)?;
        let mut output = vec![0.0; count * self.width];
        activation::gate(self.kind, values, stride, self.width, &mut output);
        Ok((CpuStorage::F32(output), (count, self.width).into()))
    }
}

impl InplaceOp1 for Heads<'_> {
    fn name(&self) -> &'static str {
        "transform_heads"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (x, stride) = rows_mut(storage, layout)?;
        rope::transform_heads(&self.transform, x, stride, self.positions);
        Ok(())
    }
}

pub(super) struct Attend<'a> {
    pub shape: &'a AttentionShape,
    pub distances: Option<Distances<'a>>,
    pub pack: &'a Pack,
    pub memory: Option<(&'a Memory, usize)>,
}

impl CustomOp1 for Attend<'_> {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (values, stride, count) = rows(storage, layout)?;
        let past = self.memory.map(|(memory, layer)| memory.past(layer));
        let (output, mut blocks) = attention::attend(self.shape, self.distances, self.pack, past, values, stride, count);
        if let Some((memory, _)) = self.memory {
            memory.keep(&mut blocks);
        }
        Ok((CpuStorage::F32(output), (count, self.shape.heads * self.shape.head_dim).into()))
    }
}
