#!/usr/bin/env bash
# Writes prometheusrule.yaml: warm.rules.yaml as the Prometheus operator wants it. A test holds the two equal.
set -euo pipefail
cd "$(dirname "$0")"
{
    cat <<'HEAD'
# Written by prometheusrule.sh from warm.rules.yaml; change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: warm
  labels: {app.kubernetes.io/name: warm}
spec:
HEAD
    sed -n '/^groups:/,$p' warm.rules.yaml | sed 's/^\(.\)/  \1/'
} > prometheusrule.yaml
