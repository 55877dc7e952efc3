"""What a chat template may use up: time, characters and numbers, counted and foreseen at each of its steps."""

import re
import time
from contextvars import ContextVar

from jinja2.exceptions import TemplateError

#: Processor seconds of the thread that renders: a machine that is busy with other work changes nothing.
SECONDS = 2.0
#: Characters that all steps of one rendering may make together; an item of a list counts as eight.
WORK = 1 << 26
#: The largest whole number that may be an argument (a width, an indent, a count), and the bits of one computed.
NUMBER, BITS = 100_000, 256
CONTAINERS = (list, tuple, dict, set)


class Budget:
    """What is left for one rendering. `marks`: two characters to put around `{% generation %}` blocks, or none."""

    def __init__(self, marks: tuple[str, str] | None = None):
        self.marks, self._work, self._end = marks, WORK, time.thread_time() + SECONDS
        self._sizes: dict[int, tuple] = {}

    def spend(self, amount: int = 0) -> None:
        """Raises TemplateError when time or work is used up."""
        self._work -= 1 + amount
        if self._work < 0:
            raise TemplateError(f"it makes more than {WORK:,} characters")
        if time.thread_time() > self._end:
            raise TemplateError(f"it takes more than {SECONDS:g} seconds")

    def size(self, value) -> int:
        """Characters in a value and all it holds, as often as it holds them: `[x, x]` is twice `x`.

        What would print or compare as more than WORK is refused, which keeps every step of a template short. Templates
        cannot change a container, so its size is found once.
        """
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, CONTAINERS):
            return 1
        if id(value) not in self._sizes:
            self.spend(len(value))
            items = (*value, *value.values()) if isinstance(value, dict) else value
            size = 8 * len(items) + sum(map(self.size, items))
            require(size <= WORK, f"it holds more than {WORK:,} characters in one value")
            self._sizes[id(value)] = size, value
        return self._sizes[id(value)][0]


#: The budget of the rendering that goes on in this thread.
current: ContextVar[Budget] = ContextVar("budget")


def foresee(name: str, values: tuple) -> None:
    """Refuses a call that could build too much, before it is made.

    The methods and filters there are (`replace`, `join`, `center`, `indent`, ...) build at most the product of the
    sizes of two of their arguments. `format` and strftime read widths from the text itself.
    """
    numbers = [abs(v) for v in values[1:] if isinstance(v, int)]
    if max(numbers, default=0) > NUMBER and name not in ("d", "default"):
        raise TemplateError(f"the number {max(numbers)} is too large for {name}")
    if name in ("format", "format_map", "_now"):
        texts = [v for v in values if isinstance(v, str)][:1]
        require(not any(re.search(r"\d{5}", text) for text in texts), "it formats with a width of over 9,999")
    sizes = [1, 1, *numbers, *(current.get().size(v) for v in values if not isinstance(v, int))]
    first, second = sorted(sizes)[-2:]
    require(first * second <= WORK or name in ("d", "default"), f"{name} could make more than {WORK:,} characters")


def counted(result):
    """Spends what a step has made, and gives it back."""
    if isinstance(result, int):
        require(result.bit_length() <= BITS, "it computes with numbers too large")
        current.get().spend()
    elif isinstance(result, CONTAINERS):
        current.get().size(result)
    else:
        current.get().spend(len(result) if isinstance(result, (str, bytes)) else 0)
    return result


def require(condition: bool, message: str) -> None:
    """Raises TemplateError unless `condition`."""
    if not condition:
        raise TemplateError(message)
