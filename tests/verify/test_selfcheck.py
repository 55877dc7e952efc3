"""Row 15: it holds, and a self-check that is turned off or blinded in one eye makes it fail."""

import pytest

from jaxllm.train.config import RunConfig
from jaxllm.train.selfcheck import SelfCheck
from jaxllm.verify import selfcheck


def test_every_objective_passes_and_every_fault_is_caught(lab):
    found = selfcheck.planted(lab)
    assert found.passed and found.cases == 28, found.failures
    assert "20 of 20 planted faults caught" in found.figure


def test_a_check_that_is_turned_off_fails_the_row(lab, monkeypatch):
    monkeypatch.setattr(SelfCheck, "before", lambda self, params, batch: "")
    monkeypatch.setattr(SelfCheck, "after", lambda self, state: [])
    found = selfcheck.planted(lab)
    assert len(found.failures) >= 19 and all("not noticed" in text for text in found.failures)


@pytest.mark.parametrize(
    "eye, fault",
    [
        ("_check_rows", "labels off by one in the rows"),
        ("_check_experts", "a loss that balances experts, without gradient"),
        ("_check_positions", "positions that run on"),
    ],
)
def test_a_check_with_one_eye_shut_fails_the_row(eye, fault, lab, monkeypatch):
    monkeypatch.setattr(selfcheck, "PASSES", ())
    monkeypatch.setattr(selfcheck, "FAULTS", tuple(one for one in selfcheck.FAULTS if one[0] == fault))
    monkeypatch.setattr(SelfCheck, eye, lambda self, *args: "")
    (failure,) = selfcheck.planted(lab).failures
    assert failure.startswith(fault)


def test_a_check_that_is_off_by_default_for_an_objective_fails_the_row(lab, monkeypatch):
    monkeypatch.setattr(selfcheck, "PASSES", ("text",))
    monkeypatch.setattr(selfcheck, "FAULTS", ())
    assert selfcheck.planted(lab).passed
    monkeypatch.setattr(RunConfig, "self_check", property(lambda self: self.dpo is not None))
    assert [text.split(" do ")[0] for text in selfcheck.planted(lab).failures] == [
        "runs of text",
        "runs of conversations",
        "runs of teachers",
    ]


def test_a_false_alarm_fails_the_row(lab, monkeypatch):
    monkeypatch.setattr(selfcheck, "PASSES", ("text",))
    monkeypatch.setattr(selfcheck, "FAULTS", ())
    monkeypatch.setattr(SelfCheck, "_apart", lambda *args: True)
    (failure,) = selfcheck.planted(lab).failures
    assert failure.startswith("text, without a fault: self-check: ")
