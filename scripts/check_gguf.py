"""Loads GGUF files with llama.cpp and compares what it computes with what jaxllm does on the same files.

    pip install 'jaxllm[gguf]' llama-cpp-python
    python scripts/check_gguf.py model.gguf [more.gguf ...] [--text TEXT] [--tolerance 0.01]

Prints, for each file, whether both cut the text into the same ids, the largest difference of the log-probabilities of
the ten most likely next tokens over all positions, and the share of positions with the same most likely one. Exits
with 1 where a file is not loaded, ids differ, or a difference exceeds the tolerance. llama.cpp takes GELU from a table
in half precision, rounds activations to that of f16 and bf16 matrices, and to 8 bits for quantised ones: the default
tolerance goes by the type of the file. Export in f32 to see whether the model is the same.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from llama_cpp import Llama

from jaxllm.hf.gguf import open_gguf
from jaxllm.hf.gguf_file import read_gguf

TEXT = "The quick brown fox jumps over the lazy dog, and 12345 more of them don't.\n\n  def f(x):\n    return x + 1\n"
F32 = 0  # GGML_TYPE_F32
#: By `general.file_type`: f32, f16, bf16.
TOLERANCE = {0: 0.02, 1: 0.05, 32: 0.3}
QUANTISED = 1.5


def ours(path: Path, text: str) -> tuple[list[int], np.ndarray]:
    """`(ids, log-probabilities [T, V])` of jaxllm."""
    opened = open_gguf(path)
    model, params = opened.load()
    ids = opened.tokenizer().encode(text, bos=True).tolist()

    @jax.jit
    def run(params, tokens_BT):
        return jax.nn.log_softmax(model.unembed(model.head(params), model.apply(params, tokens_BT)[0]))[0]

    return ids, np.asarray(run(params, jnp.asarray([ids])))[:, : opened.config.vocab]


def theirs(path: Path, text: str, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """`(ids, log-probabilities [T, V])` of llama.cpp, the latter on the ids given."""
    llama = Llama(str(path), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False, type_k=F32, type_v=F32)
    bos = llama.metadata.get("tokenizer.ggml.add_bos_token", "true") == "true"
    found = llama.tokenize(text.encode("utf-8"), add_bos=bos, special=False)
    llama.eval(ids)
    return found, np.asarray(jax.nn.log_softmax(jnp.asarray(llama.scores[: len(ids)])))


def check(path: Path, text: str, tolerance: float | None) -> bool:
    if tolerance is None:
        tolerance = TOLERANCE.get(read_gguf(path).metadata.get("general.file_type"), QUANTISED)
    ids, mine = ours(path, text)
    found, other = theirs(path, text, ids)
    best = np.argsort(-mine, axis=-1)[:, :10]
    error = np.abs(np.take_along_axis(mine, best, -1) - np.take_along_axis(other, best, -1)).max()
    same = np.mean(mine.argmax(-1) == other.argmax(-1))
    holds = found == ids and error <= tolerance
    print(
        f"{path}: {len(ids)} ids {'equal' if found == ids else f'DIFFER ({found} there, {ids} here)'}, largest "
        f"difference of log-probabilities {error:.2g}, same best token at {100 * same:.0f} %: "
        f"{'ok' if holds else f'over {tolerance:g}'}"
    )
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--tolerance", type=float)
    args = parser.parse_args()
    results = [check(path, args.text, args.tolerance) for path in args.files]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
