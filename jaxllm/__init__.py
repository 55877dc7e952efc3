"""jaxllm: decoder language models in JAX and Flax, from a text file to a trained model."""

__version__ = "0.1.0"
