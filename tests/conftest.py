"""Shared by all tests: eight virtual CPU devices, and a compilation cache so that a second run starts in seconds."""

import os

import pytest

from jaxllm.verify.lab import PATIENT, little_compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
    flags += f" {little_compiling()} {PATIENT}"  # compiling is most of the time of these tests
    os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if cache := os.environ.get("JAXLLM_TEST_CACHE"):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with the text, the tokenizer and the token stores of small runs (see small.py)."""
    import small

    from jaxllm.data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    small.write_corpus(folder)
    Tokenizer.train([path.read_text() for path in sorted(folder.glob("*.txt"))], 400, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """The Result of a small run from start to end; its folder must stay as it is."""
    import small

    from jaxllm import api

    return api.train(small.settings(corpus, tmp_path_factory.mktemp("runs") / "finished"), quiet=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """For tests of the command line: an empty folder as working folder and home."""
    monkeypatch.setenv("JAXLLM_LAUNCH", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
