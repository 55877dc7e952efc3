# %% [markdown]
# # A model in hand
# Train a small model, look at what it does, and take it apart with plain JAX. Every cell works on its own objects:
# `model.apply` is a function, `params` is a nested dict of arrays, and nothing hides between the two.

# %%
import jax
import jax.numpy as jnp
import optax

import jaxllm
from jaxllm import tree

# More `section.key=value` settings for the run below, such as a longer one: ["train.steps=1000"].
overrides = globals().get("overrides", [])

# %% [markdown]
# ## Train
# `"demo"` is a shipped settings file (Python's standard library as text); a path or a dict works as well. The run
# goes on where it was stopped if the cell is run again.

# %%
run = jaxllm.train("demo", ["out=runs/notebook", "train.steps=150", *overrides])
print(run.status, run.folder, {name: run.summary[name] for name in ("params", "loss", "bits_per_byte")})

# %% [markdown]
# ## Load, generate, evaluate

# %%
loaded = jaxllm.load(run.folder)
model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer

for made in jaxllm.generate(loaded, ["def read(", "import os\n"], max_tokens=24, temperature=0.7, seed=1):
    print(repr(made.text), f"mean log-probability {sum(made.logprobs) / len(made.logprobs):.2f}")

for piece in jaxllm.stream(loaded, "class ", max_tokens=24):
    print(piece, end="", flush=True)

# %%
before = jaxllm.evaluate(loaded, jax.__file__)
print(f"{before['bits_per_byte']:.3f} bits per byte of {jax.__file__}")

# %% [markdown]
# ## Gradients
# The loss of one text as a function of the weights. `jax.grad` gives a tree of the same shape, so the gradient norm
# of each weight is one line.


# %%
def loss_of(params, tokens_T):
    """Mean cross-entropy of the tokens after the first, in nats."""
    logits_BTV = model.logits(params, tokens_T[None, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[0], tokens_T[1:]).mean()


tokens = jnp.asarray(tokenizer.encode("def area(radius):\n    return 3.14159 * radius ** 2\n", bos=True))
loss, grads = jax.jit(jax.value_and_grad(loss_of))(params, tokens)
norms = {path: float(jnp.linalg.norm(grad)) for path, grad in tree.flatten(grads).items()}
for path in sorted(norms, key=norms.get, reverse=True)[:5]:
    print(f"{path:<32} {norms[path]:.3f}")

# %% [markdown]
# ## Change it
# Twenty steps of gradient descent on that one text, written by hand: a loop, an optimizer, the loss above.

# %%
tx = optax.adam(1e-3)


@jax.jit
def step(params, opt, tokens):
    loss, grads = jax.value_and_grad(loss_of)(params, tokens)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, loss


tuned, opt = params, tx.init(params)
for _ in range(20):
    tuned, opt, last = step(tuned, opt, tokens)
print(f"loss {float(loss):.3f} -> {float(last):.3f}")

# %% [markdown]
# What it has forgotten on the way:

# %%
after = jaxllm.evaluate(jaxllm.Loaded(model, tuned, tokenizer, loaded.step), jax.__file__)
print(f"{before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f} bits per byte")
