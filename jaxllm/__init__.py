"""jaxllm: decoder language models in JAX and Flax, from a text file to a trained model.

import jaxllm
loaded = jaxllm.load("runs/demo")
print(jaxllm.generate(loaded, "def main(")[0].text)
"""

import sys
import types

__version__ = "0.1.0"
__all__ = ["Loaded", "evaluate", "generate", "load", "stream", "train"]


def __getattr__(name: str):
    # Loaded on first use, so that `jaxllm --help` needs no jax.
    if name in __all__:
        from jaxllm import api

        return getattr(api, name)
    raise AttributeError(f"module jaxllm has no attribute {name}")


class _Package(types.ModuleType):
    """Keeps `jaxllm.train` and `jaxllm.generate` the functions: importing the rooms of these names would hide them.

    `from jaxllm.train.loop import ...` finds the rooms all the same.
    """

    def __setattr__(self, name, value):
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
