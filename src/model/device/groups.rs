//! Rows grouped by our kernels on a card, and multiplied there by one batched product of cuBLAS, which takes the address of
//! every matrix from the card's memory (`cublasGemmBatchedEx`).

use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaDType;
use candle_core::cuda::cudarc::cublas::sys;
use candle_core::cuda::cudarc::driver::{CudaView, DevicePtr, DeviceRepr};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::grouped::{Grouped, Tiles, Tiling};
use super::launch;

pub fn on_card() -> Option<&'static dyn Grouped> {
    Some(&OnCard)
}

#[derive(Debug)]
struct OnCard;

impl Grouped for OnCard {
    fn group(&self, chosen: &Tensor, experts: usize, tiling: Tiling) -> Result<Tiles> {
        let (rows, each) = chosen.dims2()?;
        let all = chosen.contiguous()?.apply_op1_no_bwd(&Group { experts, tiling })?;
        let (places, pairs) = (tiling.places(), rows * each);
        Ok(Tiles {
            rows: all.narrow(0, 0, places)?,
            places: all.narrow(0, places, pairs)?.reshape((rows, each))?,
            owners: all.narrow(0, places + pairs, tiling.tiles)?,
            tiling,
        })
    }

    fn addresses(&self, matrices: &[Tensor]) -> Result<Tensor> {
        let addresses = matrices.iter().map(address).collect::<Result<Vec<i64>>>()?;
        Tensor::new(addresses, matrices[0].device())
    }

    fn product(&self, x: &Tensor, matrices: &[Tensor], addresses: &Tensor, tiles: &Tiles) -> Result<Tensor> {
        let (inputs, outputs) = matrices[0].dims2()?;
        x.apply_op3_no_bwd(addresses, &tiles.owners, &Product { tiling: tiles.tiling, inputs, outputs })
    }
}

/// Where a matrix begins in the card's memory.
fn address(matrix: &Tensor) -> Result<i64> {
    let stored = matrix.t()?;
    let (storage, layout) = stored.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("expected a matrix on a card, found {stored:?}") };
    let stream = storage.device().cuda_stream();
    let first = match storage.dtype() {
        DType::BF16 => values::<bf16>(storage, layout)?.device_ptr(&stream).0,
        DType::F16 => values::<f16>(storage, layout)?.device_ptr(&stream).0,
        DType::F32 => values::<f32>(storage, layout)?.device_ptr(&stream).0,
        other => bail!("expected weights in bfloat16, float16 or float32, found {other:?}"),
    };
    i64::try_from(first).map_err(candle_core::Error::wrap)
}

/// All that a tensor in one piece holds.
fn values<'a, T: CudaDType + DeviceRepr>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(begin..end)),
        None => bail!("expected a tensor in one piece, found {layout:?}"),
    }
}

struct Group {
    experts: usize,
    tiling: Tiling,
}

impl CustomOp1 for Group {
    fn name(&self) -> &'static str {
        "group"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("rows are grouped like this on cards alone")
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let ((_, each), device) = (layout.shape().dims2()?, storage.device());
        let all = launch::group(device, &values(storage, layout)?, each, self.experts, self.tiling)?;
        let length = all.len();
        Ok((CudaStorage::wrap_cuda_slice(all, device.clone()), length.into()))
    }
}

#[derive(Clone, Copy)]
struct Product {
    tiling: Tiling,
    inputs: usize,
    outputs: usize,
}

/// A type that weights are stored in, as cuBLAS names it.
trait Number: CudaDType + DeviceRepr {
    const KIND: sys::cudaDataType_t;
}

impl Number for bf16 {
    const KIND: sys::cudaDataType_t = sys::cudaDataType_t::CUDA_R_16BF;
}

impl Number for f16 {
    const KIND: sys::cudaDataType_t = sys::cudaDataType_t::CUDA_R_16F;
}

impl Number for f32 {
    const KIND: sys::cudaDataType_t = sys::cudaDataType_t::CUDA_R_32F;
}

impl Product {
    fn run<T: Number>(
        &self,
        (x, x_layout): (&CudaStorage, &Layout),
        (addresses, addresses_layout): (&CudaStorage, &Layout),
        (owners, owners_layout): (&CudaStorage, &Layout),
    ) -> Result<(CudaStorage, Shape)> {
        let (Self { tiling, inputs, outputs }, device) = (*self, x.device());
        let (x, addresses, owners) = (values(x, x_layout)?, values(addresses, addresses_layout)?, values(owners, owners_layout)?);
        let y = launch::products::<T>(device, (T::KIND, tiling, [inputs, outputs]), &x, (&addresses, &owners))?;
        Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), (tiling.places(), outputs).into()))
    }
}

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "grouped_product"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("rows are multiplied like this on cards alone")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        addresses: &CudaStorage,
        addresses_layout: &Layout,
        owners: &CudaStorage,
        owners_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (dtype, x, addresses, owners) = (x.dtype(), (x, x_layout), (addresses, addresses_layout), (owners, owners_layout));
        match dtype {
            DType::BF16 => self.run::<bf16>(x, addresses, owners),
            DType::F16 => self.run::<f16>(x, addresses, owners),
            DType::F32 => self.run::<f32>(x, addresses, owners),
            other => bail!("expected rows in bfloat16, float16 or float32, found {other:?}"),
        }
    }
}
