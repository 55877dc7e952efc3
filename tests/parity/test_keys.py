"""No key of config.json that changes the function is ignored by the readers of families/."""

import pytest

pytest.importorskip("jax")

from jaxllm.errors import UserError  # noqa: E402
from jaxllm.families.registry import read_config  # noqa: E402
from jaxllm.parity.mutations import mutations  # noqa: E402
from jaxllm.parity.tiny import VARIANTS, old_form  # noqa: E402


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mutated_key_gives_another_model_or_is_refused(variant):
    published = read_config(VARIANTS[variant])[1]
    for key, mutated in mutations(variant):
        try:
            assert read_config(mutated)[1] != published, key
        except UserError as error:
            assert str(error).startswith("config.json: "), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_forms_of_config_json_are_read_as_the_same_model(variant):
    assert read_config(old_form(VARIANTS[variant]))[1] == read_config(VARIANTS[variant])[1]
