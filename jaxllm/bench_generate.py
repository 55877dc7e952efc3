"""`jaxllm bench generate MODEL`: tokens/s of prefill and of decoding, on random tokens, greedy.

Prefill: 512 tokens a row into an empty cache. Decoding: 128 tokens a row after a prompt of 16; the time of a call that
makes one token is subtracted. Both after a first call that compiles, the fastest of three: the machine's noise only
ever adds.
"""

import json as json_format
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxllm import api
from jaxllm.generate import decode, tokens

PREFILL, PROMPT, DECODE, REPEATS = 512, 16, 128, 3


def bench_generate(
    path: str, *, batches: Sequence[int] = (1, 8), dtype: str = "float32", json: bool = False
) -> list[dict]:
    """Measures each batch size, prints a table (or a line of JSON for each) and returns the rows.

    `dtype`: of a published model's weights. Raises UserError as `load` does.
    """
    loaded = api.load(path) if dtype == "float32" else api.load(path, dtype=dtype)
    params, rows = loaded.decoding, []
    for batch in batches:
        prefill = _prefill_seconds(loaded.model, params, batch)
        decoding = _decode_seconds(loaded.model, params, batch)
        row = {"batch": batch, "prefill": batch * PREFILL / prefill, "decode": batch * DECODE / decoding}
        rows.append(row)
        if json:
            print(json_format.dumps(row), flush=True)
        else:
            print(
                f"batch {batch}: prefill {row['prefill']:,.1f} tokens/s, decode {row['decode']:,.1f} tokens/s",
                flush=True,
            )
    return rows


def _random(model, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(5, model.config.vocab, (batch, length)).tolist()


def _prefill_seconds(model, params, batch: int) -> float:
    prompts = _random(model, batch, PREFILL + 1)  # the last token of a prompt is the first one decoded
    return _fastest(lambda: jax.block_until_ready(decode.prefill(model, params, prompts, batch, np.ones(batch))))


def _decode_seconds(model, params, batch: int) -> float:
    prompts = _random(model, batch, PROMPT)

    def seconds(count: int) -> float:
        return _fastest(lambda: tokens.generate(model, params, prompts, max_tokens=count, temperature=0.0))

    return seconds(DECODE + 1) - seconds(1)


def _fastest(call: Callable) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
