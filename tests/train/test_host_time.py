"""What a step costs the host, and that neither it nor compiling grows with depth."""

import statistics
import time

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.sharding import make_sharding
from jaxllm.train.step import make_state, make_train_step

DEPTHS = (2, 32, 126)


def compiled(layers: int, **shape):
    """`(step, state, batch, seconds of all threads to trace, lower and compile)` of a scanned model."""
    sharding = make_sharding(devices=jax.devices()[:1])
    model, tx = build(tiny.config(layers=layers, **shape), sharding, tiny.Kernels(unroll=0)), optax.adam(1e-3)
    state = make_state(model, tx, jax.random.key(0), params=tiny.weights(model))
    batch = sharding.batch(tiny.batch(2, 8))
    start = time.process_time()
    step = make_train_step(model, lm, tx).lower(state, batch).compile()
    return step, state, batch, time.process_time() - start


@pytest.mark.parametrize("layers", DEPTHS)
def test_a_step_takes_the_host_less_than_a_millisecond(layers):
    """What the calling thread computes until the call returns, the median of 30; a busy machine does not count."""
    step, state, batch, _ = compiled(layers, embed=8, vocab=16, attn={"heads": 2, "kv_heads": 1}, mlp={"ffw": 8})
    seconds = []
    for _ in range(30):
        start = time.thread_time()
        state, metrics = step(state, batch)
        seconds.append(time.thread_time() - start)
        jax.block_until_ready(state)
    assert np.isfinite(float(metrics["loss"]))
    assert statistics.median(seconds) < 1e-3


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    """126 scanned layers within 1.2 times of 8; the fastest of three each, in turn, without a cache."""
    with no_cache():
        times = {8: [], 126: []}
        for _ in range(3):
            for layers, seen in times.items():
                jax.clear_caches()
                seen.append(compiled(layers)[3])
    assert min(times[126]) < 1.2 * min(times[8]), times


class no_cache:
    """Within it every program is compiled. jax looks at the option once a process, until the cache is reset."""

    def __enter__(self):
        self.before = jax.config.jax_enable_compilation_cache
        self.use(False)

    def __exit__(self, *_):
        self.use(self.before)

    def use(self, on):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()
