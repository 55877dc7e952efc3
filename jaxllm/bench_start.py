"""`jaxllm bench start`: seconds from the command to its help, and to the first training step of the demo, warm.

Warm means that an earlier run has left its tokenizer, token stores and compiled programs in the cache. The first step
is there once its line is in metrics.jsonl, which is written while the second one runs.
"""

import json as json_format
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxllm.errors import ResourceError

#: Seconds.
GOALS = {"help": 0.3, "demo": 8.0}
#: After which a demo without a step has failed.
PATIENCE = 600


def bench_start(*, rounds: int = 5, json: bool = False) -> dict[str, float]:
    """Prints (with `json` as JSON) and returns the medians. Raises ResourceError when a command fails."""
    command = [sys.executable, "-c", "import sys; from jaxllm.cli import main; sys.exit(main())"]
    found = {"help": statistics.median(_seconds([*command, "--help"]) for _ in range(rounds))}
    _first_step(command)  # fills the cache
    found["demo"] = statistics.median(_first_step(command) for _ in range(rounds))
    if json:
        print(json_format.dumps(found))
    else:
        print(f"jaxllm --help                  {found['help']:6.2f} s (goal: at most {GOALS['help']})")
        print(f"jaxllm demo to the first step  {found['demo']:6.2f} s (goal: at most {GOALS['demo']:.0f})")
    return found


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _first_step(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "run/metrics.jsonl")
        environ = {name: value for name, value in os.environ.items() if name != "JAXLLM_LAUNCH"}
        with tempfile.TemporaryFile("w+") as said:
            start = time.perf_counter()
            # Five minutes' worth, as the command has it: the number of steps does not matter to the first.
            process = subprocess.Popen(
                [*command, "demo", "--out", str(metrics.parent)], stdout=said, stderr=said, env=environ
            )
            try:
                while not (metrics.exists() and metrics.stat().st_size):
                    if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                        said.seek(0)
                        raise ResourceError(f"the demo came to no step: {said.read()[-1000:]}")
                    time.sleep(0.02)
                return time.perf_counter() - start
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
