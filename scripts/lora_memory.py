"""Memory of a training step on a model of a billion parameters, full, with LoRA and with QLoRA, from the compiled
program: nothing is allocated.

    python scripts/lora_memory.py

One row of 1,024 tokens, every layer recomputed in the backward pass (remat=full), AdamW; all in float32 but for the
base of QLoRA, whose layers are nf4 (groups of 64, scales in 8 bits). Bytes are arguments, temporaries and outputs less
what outputs share with donated arguments. Exits with 1 where QLoRA needs more than 40 % of full fine-tuning.
"""

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import build
from jaxllm.model.spec import AttnSpec, LayerSpec, MlpSpec, ModelConfig
from jaxllm.objectives.lm import lm
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import abstract_state, make_train_step

LAYER = LayerSpec(attn=AttnSpec(heads=32, kv_heads=8, head=64), mlp=MlpSpec(ffw=8192))
#: The sizes of Llama 3.2 1B, but for its vocabulary, and with a head of its own.
CONFIG = ModelConfig(vocab=32_000, embed=2048, layers=16, pattern=(LAYER,), context=1024, tied=False, remat="full")
LORA = Change(lora=LoraConfig(rank=16))
NF4 = Change(quantize=QuantizeConfig(rules=(QuantizeRule(format="nf4", double=True),)))
WAYS = {"full": (), "LoRA": (LORA,), "QLoRA": (NF4, LORA)}
SHARE = 0.4


def step_bytes(changes) -> dict[str, int]:
    """Bytes of one step by their kind, and `all`."""
    model = after(build(CONFIG, make_sharding(ParallelConfig(), jax.devices()[:1])), changes)
    trainable = TRAINABLE if changes else "**"
    tx = make_optimizer(OptimConfig(), 100, model.axes)
    state = abstract_state(model, tx, trainable=trainable)
    row = {
        name: jax.ShapeDtypeStruct((1, CONFIG.context), jnp.int32)
        for name in ("tokens", "targets", "positions", "segments")
    }
    mask = jax.ShapeDtypeStruct((1, CONFIG.context), jnp.float32)
    batch = TokenBatch(row["tokens"], row["targets"], mask, row["positions"], row["segments"])
    found = make_train_step(model, lm, tx, trainable=trainable).lower(state, batch).compile().memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}
    sizes["new outputs"] = found.output_size_in_bytes - found.alias_size_in_bytes
    return {"weights": tree.nbytes(state.params)} | sizes | {"all": sum(sizes.values())}


def main() -> int:
    print(f"{tree.count(build(CONFIG).abstract) / 1e9:.2f} B parameters, 1 row of {CONFIG.context:,} tokens, MiB")
    print(f"{'':8}" + "".join(f"{name:>14}" for name in ("weights", "arguments", "temporaries", "new outputs", "all")))
    found = {}
    for name, changes in WAYS.items():
        found[name] = step_bytes(changes)
        print(f"{name:8}" + "".join(f"{size / 2**20:14,.0f}" for size in found[name].values()), flush=True)
    share = found["QLoRA"]["all"] / found["full"]["all"]
    print(f"QLoRA needs {share:.1%} of full fine-tuning (at most {SHARE:.0%})")
    return int(share > SHARE)


if __name__ == "__main__":
    raise SystemExit(main())
