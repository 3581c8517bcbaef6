#!/usr/bin/env bash
# Merging side by side: this program, mergekit, and the loop that people write with PyTorch, against reading the members and
# writing one output (cat, write, fsync), all from a warm page cache. Prints times (median), their ratio to cat, and peak
# memory; then how both grow with the number and the size of the members.
#
# usage: benches/peers/merge.sh [WORK_DIR]      needs python3 with venv; installs the peers from PyPI into WORK_DIR/venv
#   WARM=path/to/warm      another binary than target/release/warm
#   RUNS=5                 runs of each, of which the median counts
#   PEERS=0                leave the peers out (they need some 5 GB of packages)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mkdir -p "${1:-/tmp/warm-peers}" && cd "${1:-/tmp/warm-peers}" && pwd)
warm=${WARM:-$here/../../target/release/warm}
runs=${RUNS:-5}
peers=${PEERS:-1}

if [ ! -x "$work/venv/bin/python" ]; then
    python3 -m venv "$work/venv"
    packages=(numpy)
    [ "$peers" = 0 ] || packages+=(torch safetensors "mergekit==0.1.5")
    "$work/venv/bin/pip" install --quiet "${packages[@]}"
fi
python=$work/venv/bin/python

# Ten layers: 168 million parameters, 336 MB each in bfloat16, two files. Five layers: 96 million.
[ -e "$work/members/rm-9/config.json" ] || "$python" "$here/make_members.py" "$work/members" 10
[ -e "$work/small/rm-3/config.json" ] || "$python" "$here/make_members.py" "$work/small" 4 5

# measure NAME COMMAND...: the median of the wall times in seconds and the largest peak in MB, kept for the tables.
declare -A seconds peak
measure() {
    local name=$1 run
    shift
    : >"$work/times"
    for ((run = 0; run < runs; run++)); do
        rm -rf "$work/out"
        "$python" "$here/timed.py" "$work/times" "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    done
    read -r "seconds[$name]" "peak[$name]" < <(sort -n "$work/times" | awk '{ t[NR] = $1; if ($2 > m) m = $2 } END { print t[int((NR + 1) / 2)], m }')
}

members() { # FOLDER COUNT
    local i
    for ((i = 0; i < $2; i++)); do printf '%s\n' "$1/rm-$i"; done
}

read_and_write() { # FOLDER COUNT: what no merge can do without
    local reads=()
    mapfile -t reads < <(members "$1" "$2" | sed 's|$|/*.safetensors|')
    echo "cat ${reads[*]} >/dev/null; mkdir -p $work/out; cat $1/rm-0/*.safetensors >$work/out/model; sync $work/out/model"
}

recipe() { # FILE COUNT METHOD
    { echo "method: $3"; echo "init: $work/members/rm-9"; echo "dtype: bfloat16"; echo "members:"; members "$work/members" "$2" | sed 's/^/  - /'; } >"$1"
}

row() { printf '| %s | %s | %.1f | %s |\n' "$1" "${seconds[$2]}" "$(echo "${seconds[$2]} / ${seconds[$3]}" | bc -l)" "${peak[$2]}"; }

mapfile -t four < <(members "$work/members" 4)
recipe "$work/slerp.yaml" 4 slerp
measure cat4 bash -c "$(read_and_write "$work/members" 4)"
measure warm4 "$warm" merge "${four[@]}" --dtype bfloat16 --out "$work/out"
measure slerp4 "$warm" merge --recipe "$work/slerp.yaml" --out "$work/out"
measure report4 "$warm" report --recipe "$work/slerp.yaml"
echo "Four bfloat16 members of 168 M parameters (336 MB each, two files) to one bfloat16 checkpoint, median of $runs:"
echo
echo "| | seconds | times cat | peak MB |"
echo "|---|---|---|---|"
row "cat, write, fsync" cat4 cat4
row "warm merge, linear" warm4 cat4
row "warm merge, slerp by layer (reads init, and all twice)" slerp4 cat4
row "warm report with init" report4 cat4
if [ "$peers" != 0 ]; then
    measure torch4 "$python" "$here/torch_loop.py" "$work/out" "${four[@]}"
    { echo "merge_method: linear"; echo "dtype: float32"; echo "out_dtype: bfloat16"; echo "models:"
      for member in "${four[@]}"; do echo "  - {model: $member, parameters: {weight: 1.0}}"; done; } >"$work/mergekit.yaml"
    measure mergekit4 "$work/venv/bin/mergekit-yaml" "$work/mergekit.yaml" "$work/out"
    row "PyTorch, ten lines" torch4 cat4
    row "mergekit 0.1.5, linear" mergekit4 cat4
fi
echo
echo "How it grows, linear:"
echo
echo "| members | parameters | seconds | times cat | peak MB |"
echo "|---|---|---|---|---|"
for count in 2 4 6 8 10; do
    mapfile -t some < <(members "$work/members" "$count")
    measure cat bash -c "$(read_and_write "$work/members" "$count")"
    measure warm "$warm" merge "${some[@]}" --dtype bfloat16 --out "$work/out"
    row "$count | 168 M" warm cat
done
mapfile -t some < <(members "$work/small" 4)
measure cat bash -c "$(read_and_write "$work/small" 4)"
measure warm "$warm" merge "${some[@]}" --dtype bfloat16 --out "$work/out"
row "4 | 96 M" warm cat
rm -rf "$work/out"
