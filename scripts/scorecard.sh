#!/usr/bin/env bash
# The reliability scorecard with all its cases, which takes hours, and the page that publishes it.
#
#   scripts/scorecard.sh [--seed N]
#
# Writes scorecard.json and docs/reliability.md, row by row: started again, it goes on with the rows that are missing.
# `jaxllm verify` is the tier of a few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${JAXLLM:-.venv/bin/jaxllm}" verify --long --resume --json scorecard.json --page docs/reliability.md "$@"
