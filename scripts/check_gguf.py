"""Loads GGUF files with llama.cpp and compares what it computes with what jaxllm does on the same files.

    pip install 'jaxllm[gguf]' llama-cpp-python
    python scripts/check_gguf.py model.gguf [more.gguf ...] [--text TEXT] [--tolerance 0.01] [--perplexity FILE]

Prints, for each file, whether both cut the text into the same ids, the largest difference of the log-probabilities of
the ten most likely next tokens over all positions, and the share of positions with the same most likely one; with
--perplexity, that of the first 5,000 tokens of a text in both. Exits with 1 where a file is not loaded, ids differ, a
difference exceeds the tolerance, or perplexities differ by over 0.5 %. llama.cpp takes GELU from a table
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
WINDOW, WINDOWS = 250, 20
QUANTISED = 1.5


def model_of(path: Path):
    """`ids -> log-probabilities [T, V]` of jaxllm."""
    opened = open_gguf(path)
    model, params = opened.load()

    @jax.jit
    def run(params, tokens_BT):
        return jax.nn.log_softmax(model.unembed(model.head(params), model.apply(params, tokens_BT)[0]))[0]

    return lambda ids: np.asarray(run(params, jnp.asarray([ids])))[:, : opened.config.vocab]


def llama_of(path: Path, length: int) -> Llama:
    """llama.cpp on rows of a length, with keys and values in float32."""
    return Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, verbose=False, type_k=F32, type_v=F32)


def scores(llama: Llama, ids: list[int]) -> np.ndarray:
    """log-probabilities `[T, V]` of llama.cpp."""
    llama.reset()
    llama.eval(ids)
    return np.asarray(jax.nn.log_softmax(jnp.asarray(llama.scores[: len(ids)])))


def their_ids(llama: Llama, text: str) -> list[int]:
    bos = llama.metadata.get("tokenizer.ggml.add_bos_token", "true") == "true"
    return llama.tokenize(text.encode("utf-8"), add_bos=bos, special=False)


def perplexities(path: Path, text: str) -> tuple[float, float]:
    """Of jaxllm and of llama.cpp, over windows of the text."""
    ids = open_gguf(path).tokenizer().encode(text, bos=False)[: WINDOW * WINDOWS]
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).tolist()
    run, llama = model_of(path), llama_of(path, WINDOW)
    found = [(run(window), scores(llama, window)) for window in windows]
    nats = [
        [-logs[np.arange(WINDOW - 1), window[1:]].mean() for logs in pair]
        for pair, window in zip(found, windows, strict=True)
    ]
    return tuple(np.exp(np.mean(nats, axis=0)))


def check(path: Path, text: str, tolerance: float | None) -> bool:
    if tolerance is None:
        tolerance = TOLERANCE.get(read_gguf(path).metadata.get("general.file_type"), QUANTISED)
    ids = open_gguf(path).tokenizer().encode(text, bos=True).tolist()
    llama = llama_of(path, len(ids))
    found, mine, other = their_ids(llama, text), model_of(path)(ids), scores(llama, ids)
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
    parser.add_argument("--perplexity", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = [check(path, args.text, args.tolerance) for path in args.files]
    for path in args.files if args.perplexity else ():
        mine, other = perplexities(path, args.perplexity.read_text(encoding="utf-8"))
        print(f"{path}: perplexity {mine:.4f} here, {other:.4f} in llama.cpp ({other / mine - 1:+.3%})")
        results.append(abs(other / mine - 1) < 0.005)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
