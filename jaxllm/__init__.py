"""jaxllm: decoder language models in JAX and Flax, from a text file to a trained model.

import jaxllm
loaded = jaxllm.load("runs/demo")
print(jaxllm.generate(loaded, "def main(")[0].text)
"""

__version__ = "0.1.0"
__all__ = ["Loaded", "evaluate", "generate", "load", "stream", "train"]


def __getattr__(name: str):
    # Loaded on first use, so that `jaxllm --help` needs no jax.
    if name in __all__:
        from jaxllm import api

        return getattr(api, name)
    raise AttributeError(f"module jaxllm has no attribute {name}")
