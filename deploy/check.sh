#!/usr/bin/env bash
# Checks deploy/ with other people's tools: kustomize renders it, the schemas of Kubernetes, Compose and GitHub accept it, promtool
# agrees with the rules, and every query of the dashboard and of the rules gives data from a real Prometheus that scraped a real
# server under load. All of it on this machine's loopback; takes about three minutes.
#
#   deploy/check.sh [path of the warm binary]        default: target/release/warm, else target/debug/warm
#
# PICTURES names a folder for pictures of the status page.
#
# Installs what is missing (Debian packages as root, Python packages in a throw-away environment).
set -euo pipefail
cd "$(dirname "$0")/.."

warm="${1:-}"
for candidate in target/release/warm target/debug/warm; do
    if [ -z "$warm" ] && [ -x "$candidate" ]; then warm="$candidate"; fi
done
[ -x "$warm" ] || { echo "no binary: build with cargo build --release, or name one" >&2; exit 2; }
seconds="${LOAD_SECONDS:-90}"

need=()
command -v kubectl > /dev/null || need+=(kubernetes-client)
command -v promtool > /dev/null || need+=(prometheus)
command -v prometheus > /dev/null || need+=(prometheus)
command -v chromium > /dev/null || need+=(chromium fonts-dejavu)
if [ "${#need[@]}" -gt 0 ]; then
    apt-get update > /dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${need[@]}" > /dev/null
fi

work="$(mktemp -d)"
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait 2> /dev/null || true
    rm -rf "$work"
}
trap finish EXIT

python3 -m venv "$work/python"
"$work/python/bin/pip" --quiet --disable-pip-version-check install "kubernetes-validate>=1.32" check-jsonschema
python="$work/python/bin/python"

echo "== kustomize"
kubectl version --client 2> /dev/null | sed -n 1p
for overlay in cpu gpu fleet monitoring; do
    kubectl kustomize "deploy/kustomize/overlays/$overlay" > "$work/$overlay.yaml" 2> "$work/warnings" || { cat "$work/warnings"; exit 1; }
done
"$python" deploy/check.py schemas "$work"/{cpu,gpu,fleet,monitoring}.yaml deploy/drill.yaml

echo "== promtool"
promtool check config --syntax-only deploy/compose/prometheus.yaml
promtool check rules deploy/monitoring/warm.rules.yaml
promtool test rules deploy/monitoring/warm.rules.test.yaml

echo "== compose and workflows"
"$work/python/bin/check-jsonschema" --builtin-schema vendor.compose-spec deploy/compose.yaml
"$work/python/bin/check-jsonschema" --builtin-schema vendor.github-workflows .github/workflows/*.yaml
if docker compose version > /dev/null 2>&1; then
    docker compose -f deploy/compose.yaml config --quiet && echo "compose.yaml: docker compose reads it"
fi

echo "== a real Prometheus on a real server under load, $seconds s"
port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
grpc="127.0.0.1:$(port)" admin="127.0.0.1:$(port)" prometheus="127.0.0.1:$(port)"
family=(demo/family/rm-{0..4})
"$python" deploy/check.py samples demo/prompts.jsonl > "$work/samples.jsonl"
# Where the rewards of every model lie, so that the watch can say how far off they are; and all prompts go to the members too.
"$warm" calibrate "${family[@]}" --input "$work/samples.jsonl" --output "$work/calibration.json" > /dev/null 2>&1
"$warm" serve --listen "$grpc" --admin-listen "$admin" --ensemble resident --drain-delay 0s --log-format json \
    --calibration-file "$work/calibration.json" --shadow-share 1 --shadow-max-tokens-per-second 1000000 \
    "${family[@]}" 2> "$work/server.log" &
pids+=($!)
until "$warm" health --addr "$grpc" > /dev/null 2>&1; do
    kill -0 "${pids[0]}" || { cat "$work/server.log"; exit 1; }
    sleep 0.2
done
# As a target of the fleet: what the scaler asks is asked as it was rendered.
namespace="$("$python" deploy/check.py namespace "$work/fleet.yaml")"
# The same rules at a faster pace, so that a minute is enough.
sed 's/interval: 30s/interval: 2s/' deploy/monitoring/warm.rules.yaml > "$work/rules.yaml"
cat > "$work/prometheus.yaml" << CONFIG
global: {scrape_interval: 2s, evaluation_interval: 2s}
rule_files: ["$work/rules.yaml"]
scrape_configs:
  - job_name: warm
    static_configs: [{targets: ["$admin"], labels: {namespace: "$namespace"}}]
CONFIG
prometheus --config.file="$work/prometheus.yaml" --storage.tsdb.path="$work/data" --web.listen-address="$prometheus" \
    --log.level=warn 2> "$work/prometheus.log" &
pids+=($!)

end=$((SECONDS + seconds))
rounds=0
while [ "$SECONDS" -lt "$end" ]; do
    "$warm" score --connect "$grpc" --input "$work/samples.jsonl" --output /dev/null 2> /dev/null &
    "$warm" score --connect "$grpc" --input "$work/samples.jsonl" --output /dev/null --members 2> /dev/null
    wait $!
    # Prompts with several completions in one request: only these have ranks. The members are given what comes first, so on a
    # slow machine these come when all before has been scored or dropped.
    "$python" deploy/check.py settled "http://$admin/watch"
    "$warm" bench --addr "$grpc" --prompt-tokens 24 --completion-tokens 4..24 --group 4 --warmup 0s --requests 4 > /dev/null 2>&1
    rounds=$((rounds + 1))
done
echo "$rounds rounds of two callers"
# What is in flight is seen only while something is; Prometheus looks every two seconds.
"$warm" bench --addr "$grpc" --prompt-tokens 24 --completion-tokens 4..24 --group 4 --concurrency 4 --duration 120s > /dev/null 2>&1 &
pids+=($!)
sleep 6
"$python" deploy/check.py queries "http://$prometheus" deploy/monitoring/warm.dashboard.json deploy/monitoring/warm.rules.yaml \
    "$work/fleet.yaml"
"$python" deploy/check.py metrics "http://$admin/metrics" README.md
PYTHON="$python" deploy/page.sh "$admin" "${PICTURES:-$work/pictures}"
echo "deploy/ holds"
