"""lm-eval's tasks on our models: `lm_eval.simple_evaluate(model=JaxllmLM(loaded), tasks=[...])`.

What a model sees is what lm-eval's own adapters show it: `score.encode_pair` cuts as they do, a text too long for the
model loses its beginning, and a long text is scored in windows that predict each token once.
"""

import logging

from jaxllm.errors import MissingExtra, SettingsError
from jaxllm.evals.run import InHand
from jaxllm.evals.score import Pair, encode_pair, loglikelihoods, prefix
from jaxllm.generate.text import generate_text

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise MissingExtra("running lm-eval's tasks", "lm-eval", "eval") from None

log = logging.getLogger("jaxllm")

#: lm-eval's default for tasks that do not say how long an answer may be.
MAX_TOKENS = 256
#: Names that tasks use for the most tokens of an answer, and the options that a greedy choice does not look at.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWS = ("top_k", "top_p", "min_p")


class JaxllmLM(LM):
    """A loaded model as lm-eval wants it. Chat templates are not applied: control tokens never come from text."""

    def __init__(self, loaded: InHand, *, batch: int = 8):
        """`loaded`: from `jaxllm.load`; `batch`: rows at a time."""
        super().__init__()
        self.loaded, self.batch = loaded, batch
        self.max_length = loaded.model.config.context

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """`(nats, greedy)` of each `(context, continuation)`; a long context loses its beginning."""
        pairs = [encode_pair(self.loaded.tokenizer, *request.args) for request in requests]
        cut = [self._fit(pair) for pair in pairs]
        self._warn(sum(one != other for one, other in zip(pairs, cut, strict=True)), len(pairs))
        return [(score.logprob, score.greedy) for score in self._scores(cut)]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Nats of each whole text, in windows of the model's context that overlap by one token."""
        before = prefix(self.loaded.tokenizer)[-1]
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.loaded.tokenizer.encode(request.args[0]).tolist()
            for window in get_rolling_token_windows(ids, before, self.max_length, 1):
                windows.append(Pair(*make_disjoint_window(window)))
                owners.append(i)
        found = [0.0] * len(requests)
        for i, score in zip(owners, self._scores(windows), strict=True):
            found[i] += score.logprob
        return found

    def generate_until(self, requests) -> list[str]:
        """The text after each context, up to one of `until`; greedy unless the task says `do_sample`.

        Raises SettingsError for an option of generation that would be ignored.
        """
        plans = [_options(request.args[1]) for request in requests]
        prompts = [
            self._prompt(request.args[0], plan["max_tokens"]) for request, plan in zip(requests, plans, strict=True)
        ]
        self._warn(sum(cut for _, cut in prompts), len(prompts))
        order = sorted(range(len(requests)), key=lambda i: (repr(plans[i]), -len(prompts[i][0])))
        found = [""] * len(requests)
        while order:
            chosen = [i for i in order[: self.batch] if plans[i] == plans[order[0]]]
            order = order[len(chosen) :]
            parts = (self.loaded.model, self.loaded.decoding, self.loaded.tokenizer, [prompts[i][0] for i in chosen])
            seeds = {"seed": chosen} if plans[chosen[0]]["temperature"] else {}  # a repeated question is drawn anew
            for i, made in zip(chosen, generate_text(*parts, **plans[chosen[0]], **seeds), strict=True):
                found[i] = made.text
        return found

    def _scores(self, pairs: list[Pair]):
        return loglikelihoods(self.loaded.model, self.loaded.params, pairs, batch=self.batch)

    def _fit(self, pair: Pair) -> Pair:
        room = max(1, self.max_length + 1 - len(pair.continuation))  # the last token is predicted and never read
        return Pair(pair.context[-room:], pair.continuation)

    def _prompt(self, context: str, max_tokens: int) -> tuple[list[int], bool]:
        """The ids, and whether their beginning was left out."""
        room = self.max_length - max_tokens
        if room < 1:
            raise SettingsError(
                f"the task wants {max_tokens} tokens, and the model's context is {self.max_length}: no room for a "
                "prompt; set a smaller max_gen_toks (gen_kwargs of simple_evaluate)"
            )
        ids = self.loaded.tokenizer.encode(context, bos=True).tolist() or prefix(self.loaded.tokenizer)
        return ids[-room:], len(ids) > room

    def _warn(self, cut: int, of: int) -> None:
        if cut:
            log.warning(
                f"{cut} of {of} prompts are longer than the model's context of {self.max_length} tokens and lost their "
                "beginning"
            )


def _options(given: dict) -> dict:
    """What `generate_text` is to be asked for, from a task's `generation_kwargs`."""
    given = dict(given)
    lengths = [given.pop(name) for name in LENGTHS if given.get(name) is not None]
    until = given.pop("until", None) or ()
    temperature = float(given.pop("temperature", None) or 0.0)
    sampled = given.pop("do_sample", None)
    if sampled and not temperature:
        temperature = 1.0
    out = {
        "max_tokens": int(lengths[0]) if lengths else MAX_TOKENS,
        "stop": (until,) if isinstance(until, str) else tuple(until),
        "temperature": 0.0 if sampled is False else temperature,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in given if name not in (*DRAWS, "repetition_penalty")]:
        raise SettingsError(f"generation_kwargs: {unknown[0]}={given[unknown[0]]!r} would be ignored; leave it out")
    return out | {name: value for name, value in given.items() if out["temperature"] or name not in DRAWS}
