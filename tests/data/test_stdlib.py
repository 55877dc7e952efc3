import os

import pytest

from jaxllm.data import stdlib
from jaxllm.errors import DataError


@pytest.mark.fast
def test_stdlib_is_split_by_name():
    train, heldout = stdlib.files("python-stdlib:train"), stdlib.files("python-stdlib:heldout")
    assert not set(train) & set(heldout) and sorted(train + heldout) == stdlib.files("python-stdlib")
    assert 5e6 < sum(map(os.path.getsize, train)) < 2e7 and 0.01 < len(heldout) / len(train) < 0.12
    assert not [f for f in train + heldout if {"test", "tests", "site-packages", "encodings"} & set(f.split(os.sep))]
    with pytest.raises(DataError, match="python-stdlib:hold: no such split; did you mean heldout"):
        stdlib.files("python-stdlib:hold")
