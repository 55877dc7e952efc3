"""Chat templates are programs of strangers: jinja's immutable sandbox, with limits on time, size and vocabulary."""

import json
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jaxllm.data.budget import CONTAINERS, Budget, counted, current, foresee, require
from jaxllm.errors import DataError

#: Characters of a template; published ones have up to 30,000.
SOURCE = 1 << 16
#: Jinja's filters that chat templates use; the rest (`urlize`, `wordwrap`, `slice`, ...) have no place in them.
FILTERS = """abs attr capitalize count d default dictsort e escape first float format groupby indent int items join last
length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim
unique upper wordcount""".split()

#: The time that templates are told, None for the present one.
clock: ContextVar[datetime | None] = ContextVar("clock", default=None)


def run(source: str, variables: dict, marks: tuple[str, str] | None = None) -> str:
    """The text that a chat template makes of `variables`, under the rules that Hugging Face templates are written for.

    Blocks trim their lines; `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `break`, `continue` and
    `{% generation %}` (wrapped in `marks`) are there. Raises DataError for a template that fails, reaches for what the
    sandbox refuses, or exceeds a limit.
    """
    if len(source) > SOURCE:
        raise DataError(f"the chat template has {len(source):,} characters; at most {SOURCE:,} are allowed")
    with _limited(Budget(marks)):
        return _compile(source).render(variables)


@contextmanager
def _limited(budget: Budget):
    token = current.set(budget)
    try:
        yield
    except TemplateError as error:
        line = f" at line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise DataError(f"the chat template failed{line}: {error.message or type(error).__name__}") from None
    except (RecursionError, MemoryError):
        raise DataError("the chat template failed: it nests or recurses too deeply") from None
    except Exception as error:  # a template can make any built-in method raise
        raise DataError(f"the chat template failed: {type(error).__name__}: {error}") from None
    finally:
        current.reset(token)


@lru_cache(maxsize=32)
def _compile(source: str):
    return Sandbox().from_string(source)


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the text a model is trained to say."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        start, end = current.get().marks or ("", "")
        return start + caller() + end


class Metered(NodeTransformer):
    """Sends what jinja compiles to plain Python (loops, `~`, new containers) through the sandbox's meter."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = _hook("each", [node.iter], node)
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _hook("tilde", node.nodes, node)

    def visit_List(self, node):
        self.generic_visit(node)
        return _hook("made", [node], node)

    visit_Dict = visit_List

    def visit_Tuple(self, node):
        self.generic_visit(node)
        return _hook("made", [node], node) if node.ctx == "load" else node


def _hook(name: str, args: list, node):
    function = nodes.EnvironmentAttribute(name, lineno=node.lineno)
    return nodes.Call(function, args, [], None, None, lineno=node.lineno).set_environment(node.environment)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; every call, operator, loop step, filter and join spends from the budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False)
        self.filters = {name: _metered(name, self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = _metered("tojson", _tojson)
        self.globals = {
            "range": self.globals["range"],  # refuses more than 100,000 items
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "strftime_now": _now,
        }

    def _parse(self, source, name, filename):
        return Metered().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj, attribute: str):
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def concat(self, parts) -> str:
        held = []
        for part in parts:
            current.get().spend(len(part))
            held.append(part)
        return "".join(held)

    def tilde(self, *parts) -> str:
        return self.concat(map(str, parts))

    def each(self, items):
        for item in items:
            current.get().spend()
            yield item

    def made(self, container):
        return counted(container)

    def call(self, context, function, *args, **kwargs):
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(subject, (Sandbox, Extension)):
            return super().call(context, function, *args, **kwargs)
        if not isinstance(function, (Macro, _Dict)) and function is not _Namespace:
            foresee(getattr(function, "__name__", "a call"), (subject, *args, *kwargs.values()))
        return counted(super().call(context, function, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        if operator == "**":
            require(abs(left) < 1 << 32 and abs(right) <= 8, "it raises a large number to a power")
        elif operator == "%" and isinstance(left, str):
            foresee("format", (left, *(right if isinstance(right, tuple) else (right,))))
        elif operator == "*" and any(isinstance(x, (str, bytes, *CONTAINERS)) for x in (left, right)):
            foresee("*", (right, left) if isinstance(left, int) else (left, right))
        elif operator == "+":
            current.get().spend(sum(8 * len(x) for x in (left, right) if isinstance(x, CONTAINERS)))
        return counted(super().call_binop(context, operator, left, right))


def _metered(name: str, function):
    @wraps(function)
    def filtered(*args, **kwargs):
        foresee(name, (*args, *kwargs.values()))
        return counted(function(*args, **kwargs))

    return filtered


class _Dict:
    """`dict(...)` for templates, without the attributes of the class."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)` that takes no name of Python's internals."""

    def __init__(*args, **kwargs):  # as jinja's own, so that `self` can be a name
        for name in dict(*args[1:], **kwargs):
            _public(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name, value):
        super().__setitem__(_public(name), value)

    def __repr__(self) -> str:
        return "<namespace>"


def _public(name):
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name such as {name}")
    return name


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise TemplateError(str(message))


def _now(format) -> str:
    return (clock.get() or datetime.now()).strftime(format)
