"""Chat templates: what Hugging Face's do, and what a hostile one cannot."""

import threading
import time
import tracemalloc

import pytest

from jaxllm.data import budget
from jaxllm.data.template import run
from jaxllm.errors import DataError
from jaxllm.verify.code import ESCAPES

STATEMENTS = [
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% macro f() %}{% endmacro %}{{ f.__class__ }}",
    "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
    "{% for m in messages %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% call(x) undefined_thing() %}{% endcall %}",
    "{% debug %}",
    "{% for",
]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("payload", [f"{{{{ {line} }}}}" for line in ESCAPES] + STATEMENTS)
def test_escapes_are_refused(payload):
    with pytest.raises(DataError, match="the chat template failed"):
        run(payload, {"messages": MESSAGES})


DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
GREEDY = {
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "captured output": "{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "sorting": "{% set x = range(99999)|list %}{% for i in range(99999) %}{{ x|sort|length }}{% endfor %}",
    "repetition": "{{ 'a' * 1000000000 }}",
    "repeated list": "{{ [1] * 1000000000 }}",
    "power": "{{ 10 ** 10 ** 9 }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "format": "{{ '%999999999d' % 1 }}",
    "format argument": "{{ '%*d' % (999999999, 1) }}",
    "new format": "{{ '{:>999999999}'.format(1) }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "tojson": "{{ [[1]]|tojson(indent=999999999) }}",
    "replace": "{% set a = 'a' * 90000 %}{{ a|replace('a', a) }}",
    "replace method": "{% set a = 'a' * 90000 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 90000 %}{{ ([a] * 9000)|join(a) }}",
    "indent": "{% set a = '\n' * 90000 %}{{ a|indent(90000) }}",
    "expandtabs": "{% set a = '\t' * 90000 %}{{ a.expandtabs(90000) }}",
    "shared list": "{% set x = [1] * 90000 %}{% set y = [x] * 90000 %}{{ y == y }}",
    "mapped": "{% set x = [1] * 90000 %}{{ range(90000)|map('default', x)|list|length }}",
    "tilde": DOUBLING.replace("START", "'aa'").replace("STEP", "ns.x ~ ns.x"),
    "plus": DOUBLING.replace("START", "'aa'").replace("STEP", "ns.x + ns.x"),
    "list": DOUBLING.replace("START", "['aa']").replace("STEP", "ns.x + ns.x"),
    "square": DOUBLING.replace("START", "9").replace("STEP", "ns.x * ns.x"),
    "shared lists": DOUBLING.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "shared tuples": DOUBLING.replace("START", "(1,)").replace("STEP", "(ns.x, ns.x)"),
    "shared dicts": DOUBLING.replace("START", "1").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "dict calls": DOUBLING.replace("START", "1").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sum": "{{ " + "1+" * 5000 + "1 }}",
    "blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "source": "x" * 200_000,
}


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(budget, "SECONDS", 0.3)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_templates_end_early_and_small(name, brief):
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(DataError, match="the chat template"):
            run(GREEDY[name], {})
        assert time.thread_time() - start < 1.5
        assert tracemalloc.get_traced_memory()[1] < 600e6
    finally:
        tracemalloc.stop()


def test_limits_hold_in_any_thread(brief):
    found = []

    def render():
        with pytest.raises(DataError) as caught:
            run(GREEDY["nested loops"], {})
        found.append(str(caught.value))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["the chat template failed: it takes more than 0.3 seconds"] * 2


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ m|tojson }}", '{"é": "<&>", "n": 1700000000}'),
        ("{{ m|tojson(indent=2) }}", '{\n  "é": "<&>",\n  "n": 1700000000\n}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02345678"),
        ("{% for i in range(9) %}{{ i }}{% if i == 1 %}{% break %}{% endif %}{% endfor %}", "01"),
        ("{% for k, v in m.items() %}{{ loop.index0 }}{{ k }}{{ loop.last }}{% endfor %}", "0éFalse1nTrue"),
        ("{% set a, b = 1, [2] %}{{ a }}{{ b + [3] }}{{ (1, 2) }}{{ {'x': a ~ b} }}", "1[2, 3](1, 2){'x': '1[2]'}"),
        ("{% set ns = namespace(n=0) %}{% for i in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ 'a</t>b'.split('</t>')[-1].strip() }}{{ ' x '|trim }}{{ '%s-%d' % ('p', 7) }}{{ 'ab'[::-1] }}", "bxp-7ba"),
        ("{% generation %}said{% endgeneration %}{{ 1700000000 * 2 }}{{ missing }}", "said3400000000"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a' * 20000)|length }}", "20002"),
    ],
)  # fmt: skip
def test_what_published_templates_use(template, text):
    assert run(template, {"m": {"é": "<&>", "n": 1700000000}}) == text


def test_a_long_conversation_is_no_attack():
    messages = [{"role": "user", "content": "word " * 400}] * 2000
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' ~ m.content | trim + '\n' }}{% endfor %}"
    assert len(run(template, {"messages": messages})) == 2000 * (len("<|user|>\n") + 1999)


def test_an_error_of_the_template_is_its_message():
    with pytest.raises(DataError, match="failed: roles must alternate"):
        run("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(DataError, match="failed at line 2"):
        run("\n{% for %}", {})
