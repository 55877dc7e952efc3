"""The table of chips, topologies by name, and what a user sees who asks for one that does not exist."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from jaxllm.chips import ALIASES, CHIPS, GPUS, TPUS
from jaxllm.errors import MissingExtra, SettingsError, UserError
from jaxllm.plan.topology import _held_stderr, parse_topology, slices_of, topology_devices
from jaxllm.train.metrics import peak_flops


def test_no_jax_is_loaded_to_read_a_topology_or_a_program():
    code = "import sys, jaxllm.plan.program, jaxllm.plan.topology; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_a_device_has_its_share_of_a_chip(chip):
    device, n = chip.device, 2 if chip.name == "tpu7x" else 1
    for field in ("bf16", "hbm", "hbm_bandwidth", "ici", "dcn"):
        assert getattr(device, field) * n == pytest.approx(getattr(chip, field))
    assert device.flops("fp8") * n == chip.flops("fp8") >= chip.bf16
    assert device.devices_per_chip == 1 and (device.clock, device.torus) == (chip.clock, chip.torus)


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_a_cycle_is_a_power_of_two_of_flops(chip):
    """128 x 128 or 256 x 256 multipliers, some units of them: a clock typed for a chip instead of its device shows."""
    assert (chip.device.bf16 / chip.clock).is_integer() and bin(int(chip.device.bf16 / chip.clock)).count("1") == 1
    assert 1e9 < chip.clock < 2.5e9


def test_int8_and_fp8_are_those_of_bf16_where_a_chip_gains_nothing():
    assert CHIPS["v5p"].flops("int8") == 2 * CHIPS["v5p"].flops() == 918e12
    assert CHIPS["v5p"].flops("fp8") == 459e12 and CHIPS["tpu7x"].flops("int8") == 2307e12


def test_the_peaks_of_mfu_are_those_of_the_table():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    kinds |= {chip.name: f"NVIDIA {chip.name.upper()}" for chip in GPUS}
    assert {name: peak_flops(kind) for name, kind in kinds.items()} == {n: c.device.bf16 for n, c in CHIPS.items()}


@pytest.mark.parametrize(
    "text, name, chips, devices, wraps",
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64, (True, True, True)),
        ("v5p:2x4x4", "v5p:2x4x4", 32, 32, (False, False, False)),
        ("v5p:16x16x24", "v5p:16x16x24", 6144, 6144, (True, True, True)),
        ("v4:12x4x8", "v4:12x4x8", 384, 384, (True, True, True)),
        ("V5E:8x16", "v5e:8x16", 128, 128, (False, True)),
        ("v5litepod:2x2", "v5e:2x2", 4, 4, (False, False)),
        ("trillium:16x16", "v6e:16x16", 256, 256, (True, True)),
        ("ironwood:2x2x1", "tpu7x:2x2x1", 4, 8, (False, False, False)),
        ("v7x:4x4x8", "tpu7x:4x4x8", 128, 256, (True, True, True)),
        ("h100:8", "h100:8x1", 8, 8, ()),
        ("b200:8x16", "b200:8x16", 128, 128, ()),
    ],
)
def test_names_of_topologies(text, name, chips, devices, wraps):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.devices, topology.wraps) == (name, chips, devices, wraps)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize(
    "text, says",
    [
        ("v5:4x4x4", "unknown chip 'v5'; did you mean v5p?"),
        ("tpuv7x:2x2x1", "did you mean tpu7x?"),
        ("h10:8", "did you mean h100?"),
        ("v5p:4x4", "v5p has 3 dimensions, not 2; did you mean v5p:2x2x4?"),
        ("v6e:4x4x4", "v6e has 2 dimensions, not 3; did you mean v6e:8x8?"),
        ("v5e:32x32", "no such slice; did you mean v5e:16x16?"),
        ("v6e:3x3", "no such slice; did you mean v6e:2x4?"),
        ("v5p:4x4x5", "did you mean v5p:4x4x4?"),
        ("v5p:8x4x4", "did you mean v5p:4x4x8?"),
        ("v4:16x16x20", "did you mean v4:16x16x16?"),
        ("v5p:64x64x64", "did you mean v5p:16x16x24?"),
        ("v5p:16x20x28", "no such slice; did you mean v5p:16x16x24?"),
        ("v5p:0x4x4", "no such slice"),
        ("v5p", "write chip and shape, such as v5p:4x4x4"),
        ("v6e:4*4", "write chip and shape, such as v6e:4x4"),
        ("v5p-128", "write its shape instead: v5p:4x4x4 has 64 chips"),
        ("v5litepod-16", "write its shape instead: v5e:4x4 has 16 chips"),
        ("h100-16", "write its shape instead: h100:8x2"),
        ("h100:16", "write GPUs a node (1, 2, 4 or 8) x nodes, such as h100:8x2"),
        ("h100:64", "such as h100:8x8"),
        ("h100:8x2x2", "x nodes, such as h100:8x2"),
        ("h100:8x0", "x nodes"),
        ("", "unknown chip ''"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text, says):
    with pytest.raises(SettingsError, match="^topology") as error:
        parse_topology(text)
    assert says in str(error.value)


def test_every_slice_that_is_offered_is_taken():
    for chip in TPUS:
        shapes = slices_of(chip)
        assert len(set(shapes)) == len(shapes) and max(map(len, shapes)) == chip.torus
        for shape in shapes:
            topology = parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}")
            assert topology.shape == shape and topology.chips <= (chip.largest or chip.pod)
    assert set(ALIASES.values()) < set(CHIPS)


def test_a_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'jaxllm\[plan\]'"):
        topology_devices(parse_topology("v5e:2x2"))


def test_gpus_have_no_programs():
    with pytest.raises(UserError, match="h100:8x2: programs are compiled for TPUs only"):
        topology_devices(parse_topology("h100:8x2"))


def test_messages_are_held_back_unless_it_fails(capfd):
    with _held_stderr():
        os.write(2, b"noise\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError), _held_stderr():
        os.write(2, b"a reason\n")
        raise RuntimeError
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "a reason\nlater\n"


#: In a process of its own: libtpu is loaded once, with the environment that topology_devices gives it.
DEVICES = """
import json, os
from jaxllm.errors import UserError
from jaxllm.plan.topology import parse_topology, topology_devices
from jaxllm.plan.topology import QUIET
out = {}
for name, slices in (("v4:2x2x2", 1), ("v5e:4x4", 1), ("v5p:4x4x8", 1), ("v6e:2x2", 3), ("tpu7x:2x2x1", 2)):
    devices = topology_devices(parse_topology(name), slices)
    out[name] = [len(devices), len({getattr(d, "slice_index", 0) for d in devices}), devices[0].device_kind]
out["quiet"] = all(os.environ[key] == value for key, value in QUIET.items())
print(json.dumps(out))
"""


@pytest.mark.tpu_programs
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_devices_of_absent_tpus():
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "XLA_", "ALLOW_MULTIPLE"))}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "v4:2x2x2": [8, 1, "TPU v4"],
        "v5e:4x4": [16, 1, "TPU v5 lite"],
        "v5p:4x4x8": [128, 1, "TPU v5"],
        "v6e:2x2": [12, 3, "TPU v6 lite"],
        "tpu7x:2x2x1": [16, 2, "TPU7x"],
        "quiet": True,
    }
