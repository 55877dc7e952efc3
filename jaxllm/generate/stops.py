"""Stop strings in text that comes piece by piece."""

from collections.abc import Sequence

from jaxllm.errors import SettingsError


class StopFinder:
    """Passes text on up to the first stop string, and holds back whatever may turn out to be the start of one.

    The first is the one that is complete first, whatever pieces the text comes in; of two that are complete at the
    same character it is the longer one.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain with this much more of it; nothing once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        certain = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        out, self._held = "" if self.found else self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings of one string or several. Raises SettingsError for what is not text, or empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    bad = [text for text in stops if not isinstance(text, str) or not text]
    if bad:
        raise SettingsError(f"stop string {bad[0]!r}: must be text of at least one character")
    return stops
