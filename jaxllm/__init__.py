"""jaxllm: decoder language models in JAX and Flax, from a text file to a trained model.

import jaxllm
loaded = jaxllm.load("runs/demo")
print(jaxllm.generate(loaded, "def main(")[0].text)
"""

import importlib
import types

__version__ = "0.1.0"
__all__ = [
    "Loaded",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "gather",
    "generate",
    "load",
    "load_adapter",
    "prune",
    "quantize",
    "save",
    "save_adapter",
    "stream",
    "train",
]


def __getattr__(name: str):
    # Loaded on first use, so that `jaxllm --help` needs no jax.
    if name in __all__:
        from jaxllm import api

        return getattr(api, name)
    raise AttributeError(f"module jaxllm has no attribute {name}")


class _Room(types.ModuleType):
    """A package that is also the function of its name: `jaxllm.train(...)` beside `import jaxllm.train.loop`."""

    def __call__(self, *args, **options):
        return _function(self)(*args, **options)

    @property
    def __doc__(self):
        return _function(self).__doc__

    @property
    def __signature__(self):
        import inspect

        return inspect.signature(_function(self))


def _function(room: _Room):
    from jaxllm import api

    return getattr(api, room.__name__.rpartition(".")[2])


for _name in ("generate", "train"):
    importlib.import_module(f"jaxllm.{_name}").__class__ = _Room
