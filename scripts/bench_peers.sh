#!/bin/sh
# Training speed beside MaxText and nanodo, on this machine. Each peer lives in an environment of its own:
#
#   python3.12 -m venv peers/maxtext && peers/maxtext/bin/pip install 'maxtext[tpu]==0.2.5'    # 4 GB
#   git clone https://github.com/google-deepmind/nanodo peers/nanodo    # its model file needs jax, flax and optax only
#
#   MAXTEXT_PYTHON=peers/maxtext/bin/python NANODO=peers/nanodo scripts/bench_peers.sh [--rounds 5] [--workloads W1]
#
# A peer whose variable is not set is left out. NANODO_PYTHON defaults to PYTHON, PYTHON to .venv/bin/python.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
exec "$PYTHON" scripts/bench_peers.py \
  ${MAXTEXT_PYTHON:+--maxtext-python "$MAXTEXT_PYTHON"} \
  ${NANODO:+--nanodo "$NANODO"} --nanodo-python "${NANODO_PYTHON:-$PYTHON}" "$@"
