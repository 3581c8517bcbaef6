#!/usr/bin/env bash
# warm with CUDA on a machine without CUDA: the toolchain from Python wheels, then cargo.
#
#   deploy/cuda/build.sh FOLDER [FEATURES]         FEATURES: cuda (default), or cuda,flash-attn
#   deploy/cuda/build.sh FOLDER [FEATURES] check   types and lints alone, with a compiler that compiles no kernel: minutes
#
# FOLDER gets the toolchain (300 MB) and the build (2 GB); the program lies in FOLDER/target/release/warm.
# flash-attn compiles 53 kernels, each for minutes on one core; WARM_CUDA_JOBS says how many at once. Its headers come from a
# wheel, too, and nothing by git.
# CUDA_COMPUTE_CAP: 90 (Hopper, the default), 80 (Ampere), 89 (Ada).
set -euo pipefail
folder=$(mkdir -p "${1:?usage: $0 FOLDER [FEATURES] [check]}" && cd "$1" && pwd)
features=${2:-cuda} kind=${3:-}
cd "$(dirname "$0")/../.."

cargo fetch --locked
cuda=$folder/cuda
case $kind in
'') [[ ,$features, != *,flash-attn,* ]] || kind=cutlass ;;
check) cuda=$folder/no-cuda ;;
*) echo "expected check, found $kind" >&2 && exit 2 ;;
esac
python3 deploy/cuda/toolchain.py "$cuda" ${kind:+"$kind"}
# The build scripts of candle look for nvcc by the first three, for the headers of the flash kernels by the fourth, and for the
# run-time library by the last.
export CUDA_HOME="$cuda" CUDA_PATH="$cuda" NVCC="$cuda/bin/nvcc" CUDAFORGE_HOME="$cuda/forge" LIBRARY_PATH="$cuda/lib"
export PATH="$cuda/bin:$PATH"
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}" CUDAFORGE_THREADS="${WARM_CUDA_JOBS:-2}"
if [ "$kind" = check ]; then
    cargo clippy --locked --all-targets --features "$features" --target-dir "$folder/check" -- -D warnings
    exit
fi
cargo build --release --locked --bin warm --features "$features" --target-dir "$folder/target" ${WARM_CUDA_BENCH:+--bench gpu}
"$folder/target/release/warm" devices
