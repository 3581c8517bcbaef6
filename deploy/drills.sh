#!/usr/bin/env bash
# The runbook's failure drills on one machine: a flood of callers, a checkpoint that is corrupted under a running server, a volume
# that is full when a merge is written, and a process that is killed. Each says what was done and what was seen, and the script
# fails where that is not what the runbook promises. Takes half a minute.
#
#   deploy/drills.sh [path of the warm binary]        default: target/release/warm, else target/debug/warm
#
# The full volume is a small tmpfs, which only root can mount; without that right this drill says so and is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
warm="${1:-}"
for candidate in target/release/warm target/debug/warm; do
    if [ -z "$warm" ] && [ -x "$candidate" ]; then warm="$candidate"; fi
done
[ -x "$warm" ] || { echo "no binary: build with cargo build --release, or name one" >&2; exit 2; }

work="$(mktemp -d)"
server=""
finish() {
    if [ -n "$server" ]; then kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; fi
    if mountpoint -q "$work/volume" 2> /dev/null; then umount "$work/volume"; fi
    rm -rf "$work"
}
trap finish EXIT
failed() { echo "NOT as promised: $*" >&2; cat "$work/server.log" >&2; exit 1; }

cp -r demo/family "$work/models"
cat > "$work/warm.yaml" << CONFIG
listen: 127.0.0.1:0
admin: {listen: "127.0.0.1:0"}
drain: {delay: 0s}
log: {format: json}
state: $work/state
model: {members: [./models/rm-0, ./models/rm-1, ./models/rm-2]}
CONFIG
mkdir "$work/state"

start() {
    : > "$work/server.log"
    "$warm" serve --config "$work/warm.yaml" 2> "$work/server.log" &
    server=$!
    until grep -q '"ready"' "$work/server.log"; do
        kill -0 "$server" 2> /dev/null || failed "the server did not start"
        sleep 0.1
    done
    grpc="$(grep -o '"grpc":"[^"]*"' "$work/server.log" | cut -d '"' -f 4)"
}
score() { printf '{"text": "Is the sky blue?"}\n' | "$warm" score --connect "$grpc" 2> /dev/null; }

start
before="$(score)"

echo "== twice as many callers as are let in ask without a pause"
memory() { awk '/^VmRSS/ {print int($2 / 1024)}' "/proc/$server/status"; }
flood() { "$warm" bench --addr "$grpc" --prompt-tokens 16 --completion-tokens 4..16 --group 2 --warmup 0s --duration 60s --json "$@" 2> /dev/null; }
# What it holds when it is full of work but nobody is refused.
flood --concurrency 512 --requests 4000 > "$work/busy.json"
base="$(memory)"
flood --concurrency 2048 --requests 20000 > "$work/flood.json" &
load=$!
most="$base"
while kill -0 "$load" 2> /dev/null; do
    now="$(memory)"
    if [ "$now" -gt "$most" ]; then most="$now"; fi
    sleep 0.1
done
wait "$load" || failed "nobody was scored: $(cat "$work/flood.json")"
refused="$(grep -o '"RESOURCE_EXHAUSTED":[0-9]*' "$work/flood.json" | cut -d : -f 2)"
[ "${refused:-0}" -gt 0 ] || failed "nobody was refused: $(cat "$work/flood.json")"
codes="$(grep -o '"refused":{[^}]*}' "$work/flood.json" | head -1)"
[ "$codes" = "\"refused\":{\"RESOURCE_EXHAUSTED\":$refused}" ] || failed "refused otherwise, too: $codes"
# Twice the connections have buffers of their own; what waits behind them has none.
[ "$most" -le $((base + 96)) ] || failed "memory rose from $base to $most MiB"
[ "$(score)" = "$before" ] || failed "the live model answers differently"
echo "$refused of 20000 calls were refused with RESOURCE_EXHAUSTED; memory rose from $base to $most MiB"

echo "== a checkpoint is corrupted, and somebody asks for a reload"
cp "$work/models/rm-2/model.safetensors" "$work/good"
truncate -s -1 "$work/models/rm-2/model.safetensors"
if words="$("$warm" reload --addr "$grpc" 2>&1)"; then failed "the broken file was taken: $words"; fi
grep -o 'rm-2/model.safetensors.*' <<< "$words" | head -1 || failed "the file is not named: $words"
[ "$(score)" = "$before" ] || failed "the live model answers differently"
echo "the live model answers as before"

echo "== the process is killed, and comes back while its recipe is broken"
kill -9 "$server"
wait "$server" 2> /dev/null || true
sed -i 's/rm-2\]/rm-2, .\/models\/missing]/' "$work/warm.yaml"
cp "$work/good" "$work/models/rm-2/model.safetensors"
start
[ "$(score)" = "$before" ] || failed "it came up with something else"
grep -q '"level":"WARN"\|"level":"ERROR"' "$work/server.log" || failed "the log does not say why"
echo "it serves what was live last, and its log has the reason"
kill "$server"
wait "$server" || failed "it did not end well"
server=""

echo "== a merge meets a full volume"
mkdir "$work/volume"
if mount -t tmpfs -o size=1m tmpfs "$work/volume" 2> /dev/null; then
    if words="$("$warm" merge --out "$work/volume/r1" "$work"/models/rm-{0,1,2} 2>&1)"; then failed "written where there is no room: $words"; fi
    tail -1 <<< "$words"
    left="$(ls -A "$work/volume")"
    [ -z "$left" ] || failed "left behind: $left"
    echo "nothing was left behind"
else
    echo "left out: no right to mount a tmpfs"
fi
echo "the drills went as promised"
