"""Stand-ins for clusters, on one machine: gcloud with a host behind it, kubectl, srun, and pods of TPU slices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLOUD = {
    "PROJECT": "my-project",
    "ZONE": "us-east5-a",
    "REGION": "us-east5",
    "CLUSTER": "tpus",
    "NAME": "llama",
    "TOPOLOGY": "v5p:4x4x4",
    "CHECKPOINTS": "gs://my-bucket/llama",
    "IMAGE": "us-docker.pkg.dev/my-project/images/jaxllm",
}
#: What the scripts add to the command of a user.
ADDED = ["parallel.processes=null", "checkpoint.folder=gs://my-bucket/llama", "checkpoint.preempted_exit_code=75"]
PYTHON = f"#!{sys.executable}\n"

#: Notes how it was called, in calls.jsonl of the working folder.
RECORDER = """
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + chr(10))
"""

#: Cloud TPUs with one host: the file `state` is the request's state, the folder `host` the host's home. Whatever is
#: copied or run there is, in bash; `broken` says how many calls of ssh fail from here on.
GCLOUD = (
    RECORDER
    + """
import contextlib, shutil, signal, subprocess
state, host, words = pathlib.Path("state"), pathlib.Path("host"), sys.argv[1:]
group, verb = words[2:4]

def stop_host():
    if (pid := host / "jaxllm-run/pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
    shutil.rmtree(host, ignore_errors=True)

if (group, verb) == ("queued-resources", "create"):
    state.write_text("WAITING_FOR_RESOURCES")
elif (group, verb) == ("queued-resources", "delete"):
    stop_host()
    state.unlink()
elif (group, verb) == ("queued-resources", "describe"):
    if not state.exists():
        sys.exit("ERROR: NOT_FOUND: no such queued resource")
    print(state.read_text())
    if state.read_text() == "WAITING_FOR_RESOURCES":
        state.write_text("ACTIVE")
        host.mkdir(exist_ok=True)
elif (group, verb) == ("tpu-vm", "describe"):
    print("READY")
elif verb == "scp":
    shutil.copy(words[4], host)
elif verb == "ssh" and (broken := pathlib.Path("broken")).exists() and (left := int(broken.read_text())):
    broken.write_text(str(left - 1))
    sys.exit("ssh: connect to host 10.0.0.2 port 22: Connection refused")
elif verb == "ssh":
    script = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    environ = os.environ | {"HOME": str(host.resolve())}
    sys.exit(subprocess.run(["bash", "-c", script], env=environ, cwd=host).returncode)
"""
)

#: uv on the host: its environment holds the stand-in for jaxllm.
UV = """#!/bin/sh
mkdir -p jaxllm-env/bin && touch jaxllm-env/bin/python && cp "$FAKE/jaxllm" jaxllm-env/bin/jaxllm
"""

#: The command on a host: first it is preempted in the midst of training, then it crashes, then it is told to stop.
JAXLLM = """#!/bin/sh
[ "$1" = --version ] && exit
echo "$*" >> "$FAKE/commands"
case $(wc -l < "$FAKE/commands") in
  1) printf SUSPENDED > "$FAKE/state"; sleep 100 ;;
  2) exit 134 ;;
  3) exit 75 ;;
esac
"""


#: srun on one machine: a task for each node, with the variables that SLURM gives it; ends with the highest code.
SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
command = words[next(i for i, word in enumerate(words) if not word.startswith("-")):]
nodes = int(os.environ["SLURM_NNODES"])
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_NTASKS": str(nodes)}
tasks = [
    subprocess.Popen(command, env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"})
    for i in range(nodes)
]
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def set_up(folder: Path) -> None:
    """Settings of a run, and tools in bin/ that note how they are called."""
    (folder / "run.yaml").write_text("model: demo\n")
    for name in ("kubectl", "docker", "sudo", "scontrol"):
        executable(folder / f"bin/{name}", PYTHON + RECORDER)
    executable(folder / "bin/gcloud", PYTHON + GCLOUD)
    # The key of gcloud, and an agent that holds it.
    for name in ("ssh-keygen", "ssh-add"):
        executable(folder / f"bin/{name}", "#!/bin/sh\necho '3072 SHA256:abc/d+e me@here (RSA)'\n")
    executable(folder / "bin/uv", UV)
    executable(folder / "bin/srun", PYTHON + SRUN)
    executable(folder / "jaxllm", JAXLLM)


def script(name, *words, **environ):
    """A script of scripts/, run in the working folder with the tools in bin/."""
    path = f"{Path.cwd()}/bin:{os.environ['PATH']}"
    environ = {name: value for name, value in os.environ.items() if name not in CLOUD} | {"PATH": path} | environ
    words = ["bash", str(ROOT / "scripts" / name), *words]
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300)


def calls() -> list[list[str]]:
    """How the tools were called."""
    path = Path("calls.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dry(name, *words, **environ) -> str:
    """What a dry run prints; it calls nothing."""
    found = script(name, *words, "--dry-run", **CLOUD | environ)
    assert found.returncode == 0, found.stderr
    assert not calls()
    return found.stdout


def slurm(*words, **environ):
    """The job on two nodes of eight GPUs."""
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}
    return script("slurm_gpu.sh", *words, **job | environ)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pods(slices: int, hosts: int) -> list[dict[str, str]]:
    """What GKE tells each pod of a JobSet. jax believes that it is on the host of a TPU, and computes on the CPU."""
    several = {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}
    common = {
        "JAX_FORCE_TPU_INIT": "1",
        "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * hosts),
        "JAX_COORDINATOR_PORT": str(free_port()),
        "JAXLLM_LAUNCH": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    }
    return [
        common | several | {"MEGASCALE_SLICE_ID": str(n), "TPU_WORKER_ID": str(host)}
        for n in range(slices)
        for host in range(hosts)
    ]


def together(words, environs) -> list[str]:
    """What the processes print, and none of them outlives the test."""
    processes = [
        subprocess.Popen(words, env=os.environ | e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for e in environs
    ]
    try:
        found = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (out, err) in zip(processes, found, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in found]
