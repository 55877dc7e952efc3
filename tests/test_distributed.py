"""Two processes on this machine, joined by jax.distributed: they train as one, stop together, and go on."""

import os
import socket
import subprocess
import sys

import pytest
import small
import yaml

#: A process of the run. Given a step, process 1 alone gets SIGTERM after it, and each later step takes half a second,
#: since jax needs a moment to agree on the step after which both stop.
PROCESS = """
import os, signal, sys, time
from jaxllm import cli
from jaxllm.checkpoint import Preemption

reached, stop = Preemption.reached, int(sys.argv.pop(1))

def signalled(self, step):
    if step == stop and os.environ.get("JAX_PROCESS_ID") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    if stop and step >= stop:
        time.sleep(0.5)
    return reached(self, step)

Preemption.reached = signalled
sys.exit(cli.main(sys.argv[1:]))
"""


def launch(argv, stop, devices, **environ):
    # Without LLVM's optimisations, so that five processes compile in half the time.
    ours = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ours}"
    environ = os.environ | {"XLA_FLAGS": flags, "JAXLLM_LAUNCH": "0"} | environ
    argv = [sys.executable, "-c", PROCESS, str(stop), "train", *argv]
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(*processes, timeout=150):
    """`(results, news)` of each, without what the collectives say. None of them outlives the test."""
    try:
        found = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (out, err) in zip(processes, found, strict=True):
        assert process.returncode == 0, out + err
    return [("".join(x for x in out.splitlines(True) if not x.startswith("[Gloo]")), err) for out, err in found]


def pair(argv, stop=0):
    """Two processes; an argument for each where `argv` says {rank}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {"JAX_COORDINATOR_ADDRESS": address}
    ranks = [
        launch([text.format(rank=rank) for text in argv], stop, 1, JAX_PROCESS_ID=str(rank), **environ)
        for rank in (0, 1)
    ]
    return together(*ranks)


@pytest.fixture
def run_file(corpus, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small.settings(corpus, tmp_path / "run", model=small.MODEL | {"layers": 1})))
    return str(path)


@pytest.mark.slow
def test_two_processes_train_as_one_stop_together_and_go_on(run_file, tmp_path):
    one = launch([run_file, f"out={tmp_path / 'one'}"], 0, devices=2)
    together(one)
    # Hosts with disks of their own: only the folder of checkpoints is shared, so that only one has a run folder.
    two = [run_file, "parallel.processes=2", f"out={tmp_path}/run{{rank}}", f"checkpoint.folder={tmp_path / 'shared'}"]
    (first, news), (second, silence) = pair(two, stop=2)
    assert first.startswith("preempted at step ") and first.partition(":")[0] == second.partition(":")[0]
    step = int(first.split()[3].rstrip(":"))  # preempted at step 2: ...
    assert 2 <= step < 8 and (tmp_path / f"shared/{step}/manifest.json").exists()
    assert "parameters" in news and "parameters" not in silence, "one of them speaks"
    (first, news), (second, _) = pair(two)
    assert f"at step {step}" in news and first.startswith("finished at step 8")
    assert first.partition(":")[0] == second.partition(":")[0]
    ends = [{n: float.fromhex(x) for n, x in small.losses(tmp_path / out).items()} for out in ("one", "run0")]
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)
    assert (tmp_path / "run0/card.md").exists() and not (tmp_path / "run1").exists()


@pytest.mark.slow
def test_a_row_may_be_split_across_processes(run_file, tmp_path):
    """Each reads all rows, since its device holds a part of each; what they see of each other's keys travels."""
    split = ["parallel.context=2", "parallel.fsdp=1", "train.steps=3"]
    together(launch([run_file, *split, f"out={tmp_path / 'one'}"], 0, devices=2))
    two = [*split, "parallel.processes=2", f"out={tmp_path}/run{{rank}}", f"checkpoint.folder={tmp_path / 'shared'}"]
    pair([run_file, *two])
    ends = [{n: float.fromhex(x) for n, x in small.losses(tmp_path / out).items()} for out in ("one", "run0")]
    assert len(ends[0]) == 3 and ends[1] == pytest.approx(ends[0], rel=1e-6)


def test_a_wrong_number_of_processes_is_refused(run_file, tmp_path):
    environ = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    process = launch([run_file, "parallel.processes=2"], 0, devices=1, **environ)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2 and err.startswith("error: parallel.processes=2"), err
