//! What `groups.rs` gives a card to do and no safe interface offers: our kernels (`groups.cu`), and the product of a batch whose
//! matrices stand anywhere.

use candle_core::cuda::cudarc::cublas::sys;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda::{CudaDevice, WrapErr};
use candle_core::{Error, Result};

use super::grouped::Tiling;

/// Compiled from `groups.cu` when this program was built.
const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/groups.ptx"));
const MODULE: &str = "warm_groups";
const THREADS: u32 = 256;

fn number(count: usize) -> Result<u32> {
    u32::try_from(count).map_err(Error::wrap)
}

/// So many threads in blocks.
fn threads(count: usize) -> Result<LaunchConfig> {
    let blocks = number(count)?.div_ceil(THREADS).max(1);
    Ok(LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 })
}

/// What `Buffer` in the kernels divides: the row of every place, the place of every pair, the expert of every tile, and more.
#[allow(unsafe_code)]
pub fn group(device: &CudaDevice, chosen: &CudaView<'_, u32>, each: usize, experts: usize, tiling: Tiling) -> Result<CudaSlice<u32>> {
    let pairs = chosen.len();
    let length = tiling.places() + pairs + tiling.tiles + 2 * experts;
    number(length)?;
    let mut all = device.alloc_zeros::<u32>(length)?;
    let numbers = [pairs, each, experts, tiling.tiles, tiling.height].map(number).into_iter().collect::<Result<Vec<u32>>>()?;
    let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: number(size_of::<u32>() * experts)? };
    for (name, shape) in [("rank", threads(pairs)?), ("deal", one), ("place", threads(pairs)?)] {
        let kernel = device.get_or_load_custom_func(name, MODULE, KERNELS)?;
        let mut launch = kernel.builder();
        launch.arg(chosen).arg(&mut all);
        for number in &numbers {
            launch.arg(number);
        }
        // SAFETY: the kernels take these arguments. They read `pairs` numbers of the first, and write within the second, which
        // is as long as its parts: an expert's tiles are at most those of `Tiling`, and any expert is taken as one of `experts`.
        unsafe { launch.launch(shape) }.w()?;
    }
    Ok(all)
}

/// `y_i = x_i W_e^T` for every tile `i` and its expert `e`, row after row: `x` is `[tiles, height, inputs]`, `y` is
/// `[tiles, height, outputs]`, and the addresses are those of `W`, `[outputs, inputs]` each.
#[allow(unsafe_code)]
pub fn products<T: DeviceRepr>(
    device: &CudaDevice,
    (kind, tiling, [inputs, outputs]): (sys::cudaDataType_t, Tiling, [usize; 2]),
    x: &CudaView<'_, T>,
    (addresses, owners): (&CudaView<'_, i64>, &CudaView<'_, u32>),
) -> Result<CudaSlice<T>> {
    let (Tiling { tiles, height, at_once }, stream) = (tiling, device.cuda_stream());
    if [x.len(), owners.len()] != [tiles * height * inputs, tiles] {
        return Err(Error::Msg(format!("expected {tiling:?} of {inputs}, found {} and {}", x.len(), owners.len())));
    }
    // SAFETY: the kernel writes every pointer before the product reads them, and the product every number of `y`, of which it
    // reads none, its second factor being zero.
    let (mut y, mut pointers) = unsafe { (device.alloc::<T>(tiles * height * outputs)?, device.alloc::<u64>(3 * tiles)?) };
    let [x_bytes, y_bytes] = [inputs, outputs].map(|columns| (height * columns * size_of::<T>()) as u64);
    let count = number(tiles)?;
    let kernel = device.get_or_load_custom_func("point", MODULE, KERNELS)?;
    let mut launch = kernel.builder();
    launch.arg(x).arg(&mut y).arg(addresses).arg(owners).arg(&mut pointers).arg(&x_bytes).arg(&y_bytes).arg(&count);
    // SAFETY: the kernel takes these arguments. It reads a number of every tile, and of the addresses one for every expert, which
    // the owners are numbers of; it writes three for every tile.
    unsafe { launch.launch(threads(tiles)?) }.w()?;

    let [rows, inputs, outputs] = [number(height)?, number(inputs)?, number(outputs)?].map(u32::cast_signed);
    let (one, zero, handle) = (1f32, 0f32, device.cublas_handle());
    let uses = (x.device_ptr(&stream), y.device_ptr_mut(&stream), pointers.device_ptr(&stream));
    let address = |index: usize| uses.2.0 + (index * size_of::<u64>()) as u64;
    for first in (0..tiles).step_by(at_once.max(1)) {
        let batch = number(at_once.min(tiles - first))?.cast_signed();
        // SAFETY: the handle is that of the device, whose stream has written the pointers by the time the product reads them. They
        // are of `batch` weights, inputs and outputs as above, in memory that the caller's tensors and `y` hold, and that the
        // stream frees after the product. The factors are read before the call returns. To cuBLAS, for which a matrix is column
        // after column, this is `y^T = W x^T`.
        let status = unsafe {
            sys::cublasGemmBatchedEx(
                *handle.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                (&raw const one).cast(),
                address(first) as *const *const _,
                kind,
                inputs,
                address(tiles + first) as *const *const _,
                kind,
                inputs,
                (&raw const zero).cast(),
                address(2 * tiles + first) as *const *mut _,
                kind,
                outputs,
                batch,
                // Sums are in float32, and numbers of 32 bits are not rounded before.
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status.result().w()?;
    }
    drop(uses);
    Ok(y)
}
