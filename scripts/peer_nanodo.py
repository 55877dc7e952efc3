"""Times nanodo's own model under its recipe (optax AdamW, one jitted donated step); called by `jaxllm bench peers`.

Usage: python peer_nanodo.py CHECKOUT '{"vocab": ..., "embed": ..., ...}' STEPS; prints one line of JSON:
seconds of each step, and flags.
"""

import json
import sys
import time

checkout, sizes, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, checkout)

import jax  # noqa: E402
import optax  # noqa: E402
from nanodo.model import DoConfig, TransformerDo  # noqa: E402

model = TransformerDo(
    DoConfig(
        D=sizes["embed"],
        H=sizes["heads"],
        L=sizes["length"],
        N=sizes["layers"],
        V=sizes["vocab"],
        F=sizes["ffw"] * 3 // 2,  # two matrices instead of SwiGLU's three: the same number of parameters
        fsdp_enabled=False,
    )
)
tx = optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1)
tokens = jax.random.randint(jax.random.key(0), (sizes["rows"], sizes["length"] + 1), 0, sizes["vocab"])
inputs, targets = tokens[:, :-1], tokens[:, 1:]
params = jax.jit(model.init)(jax.random.key(1), inputs)
opt = jax.jit(tx.init)(params)


def loss_of(params):
    logits = model.apply(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def step(params, opt):
    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, loss


step = jax.jit(step, donate_argnums=(0, 1))
seconds = []
for _ in range(steps):
    start = time.perf_counter()
    params, opt, loss = jax.block_until_ready(step(params, opt))
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds, "flags": f"jax {jax.__version__}"}))
