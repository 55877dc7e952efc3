"""What the tests of the scorecard share: faults planted in the processes of a lab, and labs with few cases."""

from pathlib import Path

from jaxllm.verify.lab import Lab


def planted(monkeypatch, fault: str) -> None:
    """From now on a process of the lab starts with this fault in it."""
    code = f"import sys\n{fault}\nfrom jaxllm.cli import main; sys.exit(main(sys.argv[1:]))"
    monkeypatch.setattr(Lab, "command", property(lambda self: ["-c", code]))


def few(monkeypatch, cases: int) -> None:
    monkeypatch.setattr(Lab, "count", lambda self, quick, long: min(quick, cases))


def made(lab: Lab, name: str) -> Path:
    (lab.folder / name).mkdir()
    return lab.folder / name
