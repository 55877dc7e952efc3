"""All families, and which of them a config.json belongs to."""

from jaxllm.errors import SettingsError, nearest
from jaxllm.families import (
    deepseek,
    gemma,
    gpt2,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from jaxllm.families.base import Family
from jaxllm.families.keys import Keys
from jaxllm.model.spec import ModelConfig

#: In the order in which a model trained here looks for one that says its equations.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.FAMILY,
        qwen3.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        *olmo.FAMILIES,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        *gemma.FAMILIES,
        gpt2.FAMILY,
        smollm3.FAMILY,
        phi3.FAMILY,
        gpt_oss.FAMILY,
        *deepseek.FAMILIES,
    )
}


def family_of(raw: dict, where: str = "config.json") -> Family:
    """The family of a config.json, by `architectures`, else by `model_type`. Raises SettingsError."""
    names = [str(name) for name in raw.get("architectures") or ()] or [str(raw.get("model_type"))]
    for family in FAMILIES.values():
        if set(names) & {*family.architectures, *family.model_types}:
            return family
    known = [name for family in FAMILIES.values() for name in family.architectures]
    raise SettingsError(
        f"{where}: the architecture {names[0]} is not known{nearest(names[0], known)} Known families: "
        f"{', '.join(FAMILIES)}; docs/extending.md shows how to add one"
    )


def read_config(
    raw: dict, where: str = "config.json", ignore: tuple[str, ...] = ()
) -> tuple[Family, ModelConfig, Keys]:
    """`(family, settings, account of the keys)`. Raises SettingsError for a key that is not understood.

    `ignore`: keys that the user says change nothing.
    """
    family, keys = family_of(raw, where), Keys(raw, where)
    try:
        config = family.read(keys)
    except SettingsError:
        raise
    except (ValueError, TypeError) as error:  # a combination that the settings themselves refuse
        raise SettingsError(f"{where}: {_plain(error)}") from None
    keys.ignore("quantization_config", "how weights are stored; the reader of tensors uses it")
    keys.finish(ignore)
    return family, config, keys


def _plain(error: Exception) -> str:
    if hasattr(error, "errors"):  # pydantic
        return "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
    return str(error)
