#!/usr/bin/env bash
# Fails unless a Linux binary needs nothing of the machine: no loader that starts it, no shared library. `ldd` does not tell:
# the one of glibc answers 0 both for a dynamic binary and for a static one that can be loaded anywhere (static-pie, which is
# what Rust makes for musl).
#
#   deploy/static.sh PATH
set -euo pipefail
binary="$1"
# What cannot be read ends the script here.
headers="$(readelf --program-headers --dynamic --wide "$binary")"
if needs="$(grep -E 'INTERP|\(NEEDED\)' <<< "$headers")"; then
    printf '%s is not static:\n%s\n' "$binary" "$needs" >&2
    exit 1
fi
echo "$binary needs nothing of the machine"
