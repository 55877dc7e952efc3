"""config.json read key by key: each one is used, ignored for a reason, or refused by name."""

import dataclasses
from typing import Any

from jaxllm.errors import SettingsError, nearest

REQUIRED = object()

_TRAINING = "matters in training only, and training settings are the run's own"
_OUTPUT = "says what transformers returns, not what it computes"
_TOKENS = "the tokenizer and generation_config.json say it"
_DESCRIBES = "describes the file, not the function"
#: Keys of config.json that never change what a decoder computes, and why.
IGNORED = (
    dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"), _TRAINING)
    | dict.fromkeys(("initializer_range", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"), _TRAINING)
    | dict.fromkeys(("router_jitter_noise", "embedding_dropout", "residual_dropout", "output_router_logits"), _TRAINING)
    | dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states", "return_dict"), _OUTPUT)
    | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id"), _TOKENS)
    | dict.fromkeys(("transformers_version", "architectures", "model_type", "_name_or_path"), _DESCRIBES)
    | dict.fromkeys(("torch_dtype", "dtype", "auto_map", "_attn_implementation", "task_specific_params"), _DESCRIBES)
    | dict.fromkeys(("id2label", "label2id", "problem_type", "finetuning_task", "chunk_size_feed_forward"), _DESCRIBES)
    | dict.fromkeys(("_attn_implementation_autoset", "cache_implementation", "use_bfloat16"), _OUTPUT)
    | dict.fromkeys(("pretraining_tp",), "splits a product over devices; the result is the same")
    | dict.fromkeys(("is_decoder", "is_encoder_decoder", "cross_attention_hidden_size"), _DESCRIBES)
)  # fmt: skip


@dataclasses.dataclass
class Keys:
    """A config.json (or a section of it) that remembers which of its keys were read."""

    raw: dict[str, Any]
    where: str = "config.json"
    used: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value, or `default` where the key is absent or null. Raises SettingsError for a required one."""
        value = self.raw.get(key)
        if key in self.raw:
            self.used[key] = value
        if value is not None:
            return value
        if default is REQUIRED:
            raise SettingsError(f"{self.where} has no {key}{nearest(key, self.raw)}")
        return default

    def number(self, key: str, default: Any = REQUIRED, least: float = 1, kind: type = int):
        """A number of at least `least`; `kind` float takes integers too. Raises SettingsError."""
        value = self.get(key, default)
        if value is default and key not in self:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value >= least:
            name = "an integer" if kind is int else "a number"
            raise SettingsError(f"{self.where}: {key}={value!r} must be {name} of at least {least}")
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise SettingsError(f"{self.where}: {key}={value!r} must be true or false")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Raises SettingsError where the key is there with a value that changes the function in a way unknown here."""
        if key in self and self.get(key) not in allowed:
            values = " or ".join(repr(value) for value in allowed)
            raise SettingsError(
                f"{self.where}: {key}={self.raw[key]!r} changes what the model computes in a way that is not "
                f"supported here (known: {values})"
            )

    def ignore(self, key: str, why: str) -> None:
        if key in self.raw and key not in self.used:
            self.ignored[key] = why

    def section(self, key: str) -> "Keys":
        """The dict under a key, with its own account."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise SettingsError(f"{self.where}: {key}={value!r} must be an object with keys")
        return Keys(value, f"{self.where}: {key}")

    def finish(self, allow: tuple[str, ...] = ()) -> None:
        """Raises SettingsError for keys that nobody read and that are not known to be harmless.

        `allow`: keys that the user takes the responsibility for.
        """
        for key, why in IGNORED.items():
            self.ignore(key, why)
        for key in allow:
            self.ignore(key, "ignored on request")
        for key, value in self.raw.items():
            if value is None:
                self.ignore(key, "null")
        unknown = [key for key in self.raw if key not in self.used and key not in self.ignored]
        if unknown:
            listed = ", ".join(f"{key}={self.raw[key]!r}"[:80] for key in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise SettingsError(
                f"{self.where}: not understood: {listed}{more}. A key that changes what the model computes must not be "
                f"ignored; if you know that it does not, say so with --ignore-key {unknown[0]}"
            )
