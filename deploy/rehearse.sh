#!/usr/bin/env bash
# Rehearses a rolling restart on one machine: four server processes on loopback ports behind a client that takes turns, eight
# callers with one sample a request, and every server stopped by SIGTERM and started again, one after the other.
#
#   deploy/rehearse.sh [rounds]        default: 5 rounds of four restarts; about a minute
#
# It fails unless every sample has its score, every score is the one that an undisturbed server gives, and every process that
# was started had its share.
set -euo pipefail
cd "$(dirname "$0")/.."
REHEARSAL_ROUNDS="${1:-5}" cargo test --release --test main -- serve::fleet --nocapture --test-threads 1
