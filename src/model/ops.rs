//! The seam between the forward pass and what computes it: each function takes tensors on one device and does there what
//! its kernel says. On the CPU that is [`super::kernels`]; anywhere else it is [`super::plain`], in operations of candle.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};

use super::kernels::attention::Shape as AttentionShape;
use super::kernels::distances::Distances;
use super::kernels::low_rank::{Factor, Rows};
use super::kernels::rope::HeadTransform;
use super::kernels::route::{Choice, Routed, route};
use super::kernels::{activation, attention, linear, low_rank, norm, rope};
use super::pack::{MIN_ROWS, Pack};
use super::plain;
use super::prefixes::Memory;
use crate::checkpoint::{Activation, Norm};

/// Which of the two computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// Our kernels, on the CPU in float32, in place where they can be: a tensor that is handed over has no other use.
    Kernels,
    /// Operations of candle, on any device. What stands in the residual stream is in float32.
    Plain,
}

impl Ops {
    /// Normalises the rows of `x`.
    pub fn normalise(self, kind: Norm, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match (self, bias) {
            (Self::Plain, _) => plain::normalise(kind, x, weight, bias),
            (Self::Kernels, None) => x.apply_op2_no_bwd(weight, &NormOp(kind)),
            (Self::Kernels, Some(bias)) => x.apply_op3_no_bwd(weight, bias, &NormOp(kind)),
        }
    }

    /// `x + y`, where the rows of `y` may be wider than those of `x`.
    pub fn add(self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => plain::add(&x, y),
            Self::Kernels => x.inplace_op2(y, &AddRows).map(|()| x),
        }
    }

    /// `x` with the rows from `first` on replaced by those of `part`, which is as wide.
    pub fn overwrite(self, x: Tensor, first: usize, part: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => x.slice_assign(&[first..first + part.dim(0)?, 0..part.dim(1)?], part),
            Self::Kernels => x.inplace_op2(part, &Overwrite { first }).map(|()| x),
        }
    }

    /// `x + bias` on the first columns of every row.
    pub fn add_bias(self, x: Tensor, bias: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => x.broadcast_add(bias),
            Self::Kernels => x.inplace_op2(bias, &AddBias).map(|()| x),
        }
    }

    /// `act(x)`.
    pub fn activate(self, kind: Activation, x: Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => plain::activate(kind, &x),
            Self::Kernels => x.inplace_op1(&Activate(kind)).map(|()| x),
        }
    }

    /// `act(gate) * up` of rows `[gate | up | ...]`, `width` columns each.
    pub fn gate(self, kind: Activation, x: &Tensor, width: usize) -> Result<Tensor> {
        match self {
            Self::Plain => plain::gate(kind, x, width),
            Self::Kernels => x.apply_op1_no_bwd(&Gate { kind, width }),
        }
    }

    /// For every row of `x` the sum of what its experts `run` make of it, by their weights, in the order of their numbers. A row
    /// takes the experts of its largest `logits`, which has a column for each. `run` takes the number of an expert and the rows
    /// that chose it, and maybe one of them again.
    pub fn mix(self, x: &Tensor, logits: &Tensor, choice: Choice, run: Expert) -> Result<Tensor> {
        match self {
            Self::Plain => plain::mix(x, logits, choice, run),
            Self::Kernels => mix(x, &route(&logits.flatten_all()?.to_vec1::<f32>()?, choice), run),
        }
    }

    /// `x F` by a narrow factor; on the CPU with the factor's padding.
    pub fn project(self, x: &Tensor, factor: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain => x.to_dtype(factor.dtype())?.matmul(factor),
            Self::Kernels => x.apply_op2_no_bwd(factor, &Project),
        }
    }

    /// `y` with `x F` added to its columns from `first` on, `columns` of them.
    pub fn add_product(self, y: Tensor, x: &Tensor, factor: &Tensor, first: usize, columns: usize) -> Result<Tensor> {
        match self {
            Self::Plain => plain::add_product(&y, x, factor, first, columns),
            Self::Kernels => y.inplace_op3(x, factor, &AddProduct { first, columns }).map(|()| y),
        }
    }
}

/// Computes one expert on some rows; its own may be wider.
pub type Expert<'a> = &'a mut dyn FnMut(usize, &Tensor) -> Result<Tensor>;

fn mix(x: &Tensor, routed: &[Routed], run: Expert) -> Result<Tensor> {
    let output = x.zeros_like()?;
    for (expert, Routed { rows, weights }) in routed.iter().enumerate().filter(|(_, routed)| !routed.rows.is_empty()) {
        // At least so many rows that the product takes its usual path; what is added behind is not read.
        let mut gathered = rows.clone();
        gathered.resize(rows.len().max(MIN_ROWS), rows[0]);
        let own = x.index_select(&Tensor::new(gathered, x.device())?, 0)?;
        output.inplace_op2(&run(expert, &own)?, &ScatterAdd { rows, weights })?;
    }
    Ok(output)
}

/// Norms and rotates the query and key heads of `[queries | keys | values]` in place, on the CPU.
pub fn transform_heads(x: &Tensor, heads: Heads) -> Result<()> {
    x.inplace_op1(&heads)
}

/// Attention of `[queries | keys | values]` over the forest of the pack, on the CPU, in a layer of this number that goes by
/// `memory`.
pub fn attend(
    x: &Tensor,
    shape: &AttentionShape,
    distances: Option<Distances>,
    pack: &Pack,
    memory: Option<(&Memory, usize)>,
) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Attend { shape, distances, pack, memory })
}

/// What [`transform_heads`] needs beside the rows.
pub struct Heads<'a> {
    pub transform: HeadTransform<'a>,
    pub positions: &'a [u32],
}

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
        None => bail!("expected a contiguous vector, found {layout:?}"),
    }
}

struct NormOp(Norm);

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

struct AddRows;

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

struct Overwrite {
    first: usize,
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

struct ScatterAdd<'a> {
    rows: &'a [u32],
    weights: &'a [f32],
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

struct AddBias;

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

struct Project;

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

struct AddProduct {
    first: usize,
    columns: usize,
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

struct Activate(Activation);

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

struct Gate {
    kind: Activation,
    width: usize,
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

struct Attend<'a> {
    shape: &'a AttentionShape,
    distances: Option<Distances<'a>>,
    pack: &'a Pack,
    memory: Option<(&'a Memory, usize)>,
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
