"""What a person sees while nothing is there to see."""

import threading
import time

import pytest

from jaxllm.train.progress import Show


@pytest.mark.fast
def test_a_long_wait_is_said_and_a_short_one_is_not(capsys):
    show = Show(8)
    with show.waiting("compiling ...", seconds=60):
        pass
    assert capsys.readouterr().err == ""
    said, say = threading.Event(), show.say
    show.say = lambda text: (say(text), said.set())
    with show.waiting("compiling ...", seconds=0):
        assert said.wait(60)
    assert capsys.readouterr().err == "compiling ...\n"
    with Show(8, quiet=True).waiting("compiling ...", seconds=0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
