#!/usr/bin/env bash
# Checks and figures of one card. Run it where the card is, with the programs that deploy/cuda/build.sh made elsewhere:
#
#   WARM_CUDA_BENCH=1 deploy/cuda/build.sh FOLDER [cuda,flash-attn]    where the programs are built
#   benches/gpu.sh checks   WARM GPU_BENCH OUT [FAMILIES]    golden scores, flash kernels, rank agreement, what fails, 0.6B
#   benches/gpu.sh rates-1b WARM GPU_BENCH OUT               1B, a merge of four, a saturated server
#   benches/gpu.sh rates-8b WARM GPU_BENCH OUT               8B
#   benches/gpu.sh all      WARM GPU_BENCH OUT [FAMILIES]    all of these, what counts most first
#   benches/gpu.sh dry      WARM GPU_BENCH OUT [FAMILIES]    every row once on the CPU, with a tiny model: no figure counts
#
# WARM is the program, GPU_BENCH the bench (target/release/deps/gpu-*), OUT a folder for models (40 GB for the rates) and results.
# Python alone is enough; what is held beside transformers is skipped where there is no torch. Every result is a line of JSON
# in OUT/results-PART.jsonl; the table comes last, and what misses its bound is said there.
#
# A call ends by itself before WARM_GPU_SECONDS (570) have passed, with the exit code 3 if there is more to do: the same call
# again goes on behind what is done. A new beginning is a new OUT, or one without done-PART.
set -euo pipefail
part=${1:?usage: $0 checks|rates-1b|rates-8b|all|dry WARM GPU_BENCH OUT [FAMILIES]} warm=$2 bench=$3 out=$4
here=$(cd "$(dirname "$0")" && pwd)
families=${5:-$here/../tests/fixtures/conformance}
device=${WARM_GPU_DEVICE:-cuda:0}
seconds=${WARM_GPU_SECONDS:-570}
models=$out/models
mkdir -p "$models"
results=$out/results-$part.jsonl done=$out/done-$part
[ -e "$done" ] || : >"$results"
touch "$done"

tell() {
    python3 "$here/peers/gpu.py" table "$results"
}
# One step may fail without those behind it being lost; what failed is told, and the exit code says so. A step is done when it
# has ended by itself, well or badly; what one has written that did not is not kept.
run() {
    if grep -qxF -- "$*" "$done"; then return; fi
    local left=$((seconds - SECONDS)) code=0
    [ "$left" -gt 0 ] || more
    echo "== $*" >&2
    timeout "$left" "$@" >"$out/step.jsonl" || code=$?
    [ "$code" -ne 124 ] || more
    cat "$out/step.jsonl" >>"$results"
    [ "$code" -eq 0 ] || { echo "FAILED: $*" >&2; echo "{\"what\": \"FAILED\", \"step\": \"$*\"}" >>"$results"; }
    echo "$*" >>"$done"
}
more() {
    tell
    echo "not done yet: the same call again goes on" >&2
    exit 3
}
peer() {
    run python3 "$here/peers/gpu.py" "$@"
}
rates() {
    run "$bench" rates --device "$device" --dtype bfloat16 "$@"
}
# What a card does when it has no room, and when it is broken; each in a process of its own.
failing() {
    run "$bench" split --device "$device" --dtype bfloat16 "$1"
    run "$bench" lost --device "$device" --dtype bfloat16 "$1"
}

checks() {
    # In float32 on the plain path: every family against the scores of transformers. Then what 16 bits leave of that.
    run "$bench" parity --device "$device" --dtype float32 "$families"
    run "$bench" parity --device "$device" --dtype float16 "$families"
    run "$bench" flash --device "$device"
    peer make "$models" qwen3-0.6b
    failing "$models/qwen3-0.6b"
    rates "$models/qwen3-0.6b"
    # What equal bits cost is the difference to the rates before.
    rates --batch-invariant "$models/qwen3-0.6b"
    peer beside "$models/qwen3-0.6b" --bench "$bench" --device "$device"
    peer step "$models/qwen3-0.6b" --warm "$warm" --device "$device"
    # A mixture, whose rows choose their experts on the card; which way it goes there stands behind `on`.
    peer make "$models" qwen3-moe-4l
    rates "$models/qwen3-moe-4l"
    rates --batch-invariant "$models/qwen3-moe-4l"
}
rates_1b() {
    peer make "$models" llama-1b --members 4
    rates "$models/llama-1b"
    rates --batch-invariant "$models/llama-1b"
    peer beside "$models/llama-1b" --bench "$bench" --device "$device"
    run "$bench" load --device "$device" --dtype bfloat16 "$models"/llama-1b-member-{0,1,2,3}
    peer server "$models/llama-1b" --warm "$warm" --bench "$bench" --device "$device"
    peer step "$models/llama-1b" --warm "$warm" --device "$device"
}
rates_8b() {
    peer make "$models" llama-8b
    rates --rounds 3 "$models/llama-8b"
    rates --rounds 3 --batch-invariant "$models/llama-8b"
    peer step "$models/llama-8b" --warm "$warm" --device "$device"
}

"$warm" devices >&2
case $part in
checks) checks ;;
rates-1b) rates_1b ;;
rates-8b) rates_8b ;;
all)
    # What counts most comes first.
    checks
    rates_8b
    rates_1b
    ;;
dry)
    device=cpu
    run "$bench" parity --device cpu --dtype float32 "$families"
    run "$bench" parity --device cpu --dtype float16 "$families"
    # The kernels are not there without a card.
    "$bench" flash --device cpu >>"$results" 2>/dev/null || echo '{"what": "flash, skipped"}' >>"$results"
    peer make "$models" tiny --members 4
    failing "$models/tiny"
    rates --pack 2048 --rounds 1 "$models/tiny"
    rates --pack 2048 --rounds 1 --batch-invariant "$models/tiny"
    peer beside "$models/tiny" --bench "$bench" --device cpu --rounds 1
    run "$bench" load --device cpu --dtype bfloat16 "$models"/tiny-member-{0,1,2,3}
    peer server "$models/tiny" --warm "$warm" --bench "$bench" --device cpu --rounds 1 --seconds 5s --callers 2
    peer step "$models/tiny" --warm "$warm" --device cpu
    peer make "$models" tiny-moe
    rates --pack 2048 --rounds 1 "$models/tiny-moe"
    ;;
*)
    echo "expected checks, rates-1b, rates-8b, all or dry, found $part" >&2
    exit 2
    ;;
esac
tell
! grep -q '"what": "FAILED"' "$results"
