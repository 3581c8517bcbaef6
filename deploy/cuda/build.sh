#!/usr/bin/env bash
# warm with CUDA on a machine without CUDA: the toolchain from Python wheels, then cargo.
#
#   deploy/cuda/build.sh FOLDER [FEATURES]      FEATURES: cuda (default), or cuda,flash-attn
#
# FOLDER gets the toolchain (300 MB) and the build (2 GB); the program lies in FOLDER/target/release/warm.
# flash-attn compiles 53 kernels, each for minutes on one core, and fetches CUTLASS with git; WARM_CUDA_JOBS says how many at once.
# CUDA_COMPUTE_CAP: 90 (Hopper, the default), 80 (Ampere), 89 (Ada).
set -euo pipefail
folder=$(mkdir -p "${1:?usage: $0 FOLDER [FEATURES]}" && cd "$1" && pwd)
features=${2:-cuda}
cd "$(dirname "$0")/../.."

cargo fetch --locked
python3 deploy/cuda/toolchain.py "$folder/cuda"
# The build scripts of candle look for nvcc by the first three, and for the run-time library by the last.
export CUDA_HOME="$folder/cuda" CUDA_PATH="$folder/cuda" NVCC="$folder/cuda/bin/nvcc" LIBRARY_PATH="$folder/cuda/lib"
export PATH="$folder/cuda/bin:$PATH"
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}" CUDAFORGE_THREADS="${WARM_CUDA_JOBS:-2}"
cargo build --release --locked --bin warm --features "$features" --target-dir "$folder/target" ${WARM_CUDA_BENCH:+--bench gpu}
"$folder/target/release/warm" devices
