#!/usr/bin/env bash
# Checks and figures of one card. Run it where the card is, with the programs that deploy/cuda/build.sh made elsewhere:
#
#   WARM_CUDA_BENCH=1 deploy/cuda/build.sh FOLDER            where the programs are built
#   benches/gpu.sh checks  WARM GPU_BENCH OUT [FAMILIES]     minutes: golden scores, rank agreement, rates of 0.6B
#   benches/gpu.sh rates   WARM GPU_BENCH OUT                10 minutes: 1B and 8B, a merge of four, a saturated server
#
# WARM is the program, GPU_BENCH the bench (target/release/deps/gpu-*), OUT a folder for models (40 GB for `rates`) and results.
# It needs Python with torch and transformers. Every result is a line of JSON in OUT/results.jsonl; the table comes last.
set -euo pipefail
part=${1:?usage: $0 checks|rates WARM GPU_BENCH OUT [FAMILIES]} warm=$2 bench=$3 out=$4
here=$(cd "$(dirname "$0")" && pwd)
families=${5:-$here/../tests/fixtures/conformance}
device=${WARM_GPU_DEVICE:-cuda:0}
models=$out/models
mkdir -p "$models"
results=$out/results.jsonl
: >"$results"

# One result may fail without those behind it being lost; what failed is told, and the exit code says so.
failed=0
run() {
    echo "== $*" >&2
    "$@" >>"$results" || { echo "FAILED: $*" >&2; failed=1; }
}

"$warm" devices >&2
case $part in
checks)
    # In float32 on the plain path: every family against the scores of transformers.
    run "$bench" parity --device "$device" --dtype float32 "$families"
    run python3 "$here/peers/gpu.py" make "$models" qwen3-0.6b
    run "$bench" rates --device "$device" --dtype bfloat16 "$models/qwen3-0.6b"
    run python3 "$here/peers/gpu.py" beside "$models/qwen3-0.6b" --bench "$bench" --device "$device"
    ;;
rates)
    run python3 "$here/peers/gpu.py" make "$models" llama-1b --members 4
    run "$bench" rates --device "$device" --dtype bfloat16 "$models/llama-1b"
    run python3 "$here/peers/gpu.py" beside "$models/llama-1b" --bench "$bench" --device "$device"
    run "$bench" rates --rounds 1 --device "$device" --dtype bfloat16 "$models"/llama-1b-member-*
    run python3 "$here/peers/gpu.py" server "$models/llama-1b" --warm "$warm" --bench "$bench" --device "$device"
    rm -rf "$models"/llama-1b*
    run python3 "$here/peers/gpu.py" make "$models" llama-8b
    run "$bench" rates --rounds 3 --device "$device" --dtype bfloat16 "$models/llama-8b"
    ;;
*)
    echo "expected checks or rates, found $part" >&2
    exit 2
    ;;
esac
python3 "$here/peers/gpu.py" table "$results"
exit $failed
