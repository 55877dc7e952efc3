"""The launcher starts the same command once more, only where that helps, and keeps what the user has set."""

import os
import subprocess
import sys

import pytest

from jaxllm import launch

CHILD = """
import logging, os, sys
from jaxllm import launch
logging.basicConfig(level=os.environ.get("LEVEL", "INFO"), format="%(message)s")
launch._pages_on_request = launch._on_cpu = lambda *_: True
launch._glibc = lambda: (2, 39)
launch.jaxlib = lambda: (0, int(os.environ.get("MINOR", 12)))
launch.relaunch(sys.argv[1:], getattr(logging, os.environ.get("SAY", "INFO")), "--cpu-fast" in sys.argv)
names = ("JAXLLM_LAUNCH", "GLIBC_TUNABLES", "XLA_FLAGS")
print(*(os.environ.get(name) for name in names), sys.argv[1:], "jax" in sys.modules)
"""


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A machine on which huge pages help; returns the file that says how the kernel gives them."""
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr(launch, "THP", enabled)
    monkeypatch.setattr(launch, "ACCELERATORS", ())
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("glibc", "2.39"))
    return enabled


def start(tmp_path, *argv, **environ):
    """Output lines and log lines of a command that calls the launcher first."""
    script = tmp_path / "command.py"
    script.write_text(CHILD)
    clean = {k: v for k, v in os.environ.items() if k not in (launch.SWITCH, launch.TUNABLES, "XLA_FLAGS")}
    command = [sys.executable, script, *argv]
    done = subprocess.run(command, env=clean | environ, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_the_same_command_starts_once_more_before_jax_loads(tmp_path):
    out, log = start(tmp_path, "train", "a b.yaml", "optim.lr=1")
    assert out == ["1 glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2 None ['train', 'a b.yaml', 'optim.lr=1'] False"]
    assert len(log) == 1 and "JAXLLM_LAUNCH=0" in log[0]


def test_the_line_is_for_those_who_ask(tmp_path):
    out, log = start(tmp_path, SAY="DEBUG")
    assert out[0].startswith("1 glibc") and log == []
    out, log = start(tmp_path, SAY="DEBUG", LEVEL="DEBUG")
    assert out[0].startswith("1 glibc") and len(log) == 1


def test_the_switch_and_ones_own_choice_of_pages_are_silent(tmp_path):
    assert start(tmp_path, JAXLLM_LAUNCH="0") == (["0 None None [] False"], [])
    tunables = "glibc.malloc.hugetlb=2:glibc.malloc.arena_max=4"
    assert start(tmp_path, GLIBC_TUNABLES=tunables) == ([f"None {tunables} None [] False"], [])


def test_other_variables_are_kept(tmp_path):
    out, _ = start(tmp_path, GLIBC_TUNABLES="glibc.malloc.arena_max=8", XLA_FLAGS="--xla_dump_to=x")
    assert out == ["1 glibc.malloc.arena_max=8:glibc.malloc.hugetlb=1 --xla_dump_to=x [] False"]


def test_the_fast_profile_adds_to_what_is_set(tmp_path):
    own = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=3", "XLA_FLAGS": "--xla_cpu_use_onednn=false"}
    out, log = start(tmp_path, "--cpu-fast", SAY="DEBUG", **own)
    tunables, flags = out[0].split(" ")[1], out[0].partition("--xla")[2]
    assert tunables.startswith("glibc.malloc.arena_max=3:glibc.malloc.hugetlb=1:") and "arena_max=1" not in tunables
    assert "mmap_max=0" in tunables and "trim_threshold" in tunables
    assert flags.startswith("_cpu_use_onednn=false --xla_cpu_experimental_onednn_fusion_type=dot,eltwise")
    assert len(log) == 1 and "JAXLLM_LAUNCH=0" in log[0]


def test_what_the_fast_profile_cannot_do_is_said(tmp_path):
    out, log = start(tmp_path, "--cpu-fast", MINOR="10")
    assert "onednn" not in out[0] and "mmap_max=0" in out[0] and "jaxlib before 0.12" in log[0]
    out, log = start(tmp_path, "--cpu-fast", JAXLLM_LAUNCH="0")
    assert out[0].startswith("0 None None") and "turned off by JAXLLM_LAUNCH=0" in log[0]


def test_a_program_that_calls_the_command_line_is_not_replaced(linux, monkeypatch):
    monkeypatch.delenv(launch.SWITCH, raising=False)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("replaced"))
    launch.relaunch(["train", "not what this process was started with"])


def test_wanted_where_it_helps(linux):
    assert launch.wanted({})
    assert launch.wanted({"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]"])
def test_no_pages_where_the_kernel_does_not_wait_to_be_asked(linux, mode):
    few = {launch.TUNABLES: "glibc.malloc.arena_max=2", launch.SWITCH: "1"}
    linux.write_text(mode)
    assert launch.environment({}) == few
    linux.unlink()
    assert launch.environment({}) == few


@pytest.mark.parametrize("libc", [("", ""), ("musl", "1.2.5"), ("glibc", "2.34")])
def test_not_without_a_glibc_that_knows_the_tunables(linux, monkeypatch, libc):
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: libc)
    assert not launch.wanted({})


def test_not_on_an_accelerator_unless_the_user_says_cpu(linux, monkeypatch, tmp_path):
    device = tmp_path / "nvidia0"
    device.touch()
    monkeypatch.setattr(launch, "ACCELERATORS", (str(device),))
    assert not launch.wanted({})
    assert not launch.wanted({"JAX_PLATFORMS": "tpu"})
    assert launch.wanted({"JAX_PLATFORMS": "cpu"})
