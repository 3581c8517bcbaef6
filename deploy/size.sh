#!/usr/bin/env bash
# What a server of five members takes on this machine: memory with members off, resident and as adapters, time until it is ready
# (members read and merged, then the merge from the cache), and tokens a second. Writes random models (bfloat16) into a folder of
# its own, a size at a time, and prints rows of the runbook's table. Nothing else should run meanwhile.
#
#   deploy/size.sh [SIZE...]        60M and 0.6B where memory has room for them; `tiny` tries the script. WARM names the binary,
#                                   default: target/release/warm
#
# Needs Python 3 and, for files of up to 7 GB, room in TMPDIR.
set -euo pipefail
cd "$(dirname "$0")/.."
warm="${WARM:-target/release/warm}"
[ -x "$warm" ] || { echo "no binary: build with cargo build --release, or name one in WARM" >&2; exit 2; }
[ "$#" -gt 0 ] || set -- 60M 0.6B
exec python3 deploy/size.py "$warm" "$@"
