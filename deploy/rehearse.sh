#!/usr/bin/env bash
# Rehearses a fleet's life on one machine: server processes on loopback ports behind a client that takes turns, eight callers
# with one sample a request, four samples a prompt, of which the later three name the model of the first. Three servers begin
# and a fourth joins late; all are stopped by SIGTERM and started again, one after the other; some are killed; a new model is
# staged on all of them and `warm activate --all` swaps it forth and back.
#
#   deploy/rehearse.sh [rounds]        default: 5 rounds, each of four restarts, one kill and four swaps; a few minutes
#
# It fails unless every sample has its score, every score is the one that an undisturbed server of the same model gives, no
# prompt's samples come from two models, and every process that was started had its share. The runbook has its figures.
set -euo pipefail
cd "$(dirname "$0")/.."
REHEARSAL_ROUNDS="${1:-5}" cargo test --release --test main -- serve::fleet --nocapture --test-threads 1
