"""Python processes with the usual imports, for what only the end of a process can show."""

import subprocess
import sys
import textwrap

IMPORTS = """
import os, re, sys, time, jax, jax.numpy as jnp
from jaxllm.checkpoint import *
from jaxllm.checkpoint import manifest, together
from jaxllm.errors import UserError
"""


def run(code: str, *args, env=None) -> subprocess.Popen:
    """A Python process with the usual imports, for what only the end of a process can show."""
    command = [sys.executable, "-c", IMPORTS + textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
