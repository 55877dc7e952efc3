"""Row 14: nothing that a file holds is run as code, and no path in a file leads out of its folder."""

import ast
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxllm
from jaxllm.errors import UserError
from jaxllm.verify.lab import Found, Lab

#: Modules that make code or objects of bytes, and the built-in functions that run text.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "code", "codeop"}
FUNCTIONS = {"eval", "exec", "compile", "__import__"}
#: `yaml.load` and its like make objects; numpy reads pickled arrays where it is asked to.
UNSAFE_YAML = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"}

#: What a chat template may try, as expressions.
ESCAPES = """
''.__class__
''.__class__.__mro__[1].__subclasses__()
''['__class__']
''|attr('__class__')
['']|map(attribute='__class__')|list
[{}]|map('attr', '__class__')|list
[{}]|selectattr('__class__')|list
[{}]|groupby('__class__.__name__')|list|string
dict.__class__
dict.__init__.__globals__
namespace.__init__.__globals__
namespace(__class__=1)
namespace(a=1)._Namespace__attrs
range.__globals__
raise_exception.__globals__['__builtins__']
raise_exception.__code__
strftime_now.__globals__
self.__init__.__globals__
self._TemplateReference__context
self.__class__
joiner.__init__.__globals__
cycler.__init__.__globals__.os.popen('id').read()
lipsum.__globals__['os']
get_flashed_messages.__globals__
messages.__class__.__base__
messages[0].update({'role': 'x'})
messages.append(1)
messages.clear()
messages[0].content.format.__self__.__class__.__init__
'{0.__class__}'.format(messages)
'{0.__class__.__mro__}'.format('')
'{a.__class__}'.format_map({'a': 1})
(messages[0].content.format)('{0.__class__}').__class__
['{0.__class__}'.format]|map('call', 1)|list
(messages|map(attribute='role')).gi_frame.f_globals
(messages|map(attribute='role')).gi_code
""".strip().splitlines()

#: What an index of weights may name, from `FOLDER/secret` up.
PATHS = ("../secret.safetensors", "/etc/passwd", "..", "a/../../secret.safetensors", "sub/../../secret.safetensors")
#: And what an adapter may say of its base, from `FOLDER/secret` up.
BASES = ("../secret", "../secret/adapter_model.safetensors", "sub/../../secret", "..")
#: Settings of an adapter that hold text, and by which peft finds files.
NAMED = ("base_model_name_or_path", "revision", "auto_mapping", "layers_pattern", "task_type")


def no_code(lab: Lab) -> Found:
    """The package has no call that runs what it reads; templates cannot reach out; paths cannot leave their folder."""
    package = Path(jaxllm.__file__).parent
    files = sorted(package.rglob("*.py"))
    failures = []
    for path in files:
        failures += unsafe(path.read_text("utf-8"), path.relative_to(package).as_posix())
    failures += list(_escapes()) + list(_paths(lab)) + list(_adapters(lab))
    figure = (
        f"{len(files)} files searched, {len(ESCAPES)} template escapes refused, {len(PATHS)} paths out of an index "
        f"refused and {len(BASES) + 1} of an adapter never opened"
    )
    return Found(len(files) + len(ESCAPES) + len(PATHS) + len(BASES) + 1, tuple(failures), figure)


def unsafe(source: str, where: str) -> Iterator[str]:
    """`where:line: what` of each call or import by which a file could be run."""
    for node in ast.walk(ast.parse(source)):
        if what := _unsafe(node):
            yield f"{where}:{node.lineno}: {what}"


def _unsafe(node) -> str | None:
    if isinstance(node, ast.Import):
        return next((f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES), None)
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
        return f"from {node.module} import"
    if not isinstance(node, ast.Call):
        return None
    called = node.func
    if isinstance(called, ast.Name) and called.id in FUNCTIONS:
        return f"{called.id}()"
    of = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else None
    if of == "yaml" and called.attr in UNSAFE_YAML:
        return f"yaml.{called.attr}()"
    if any(key.arg == "allow_pickle" and getattr(key.value, "value", True) is not False for key in node.keywords):
        return "allow_pickle"
    return None


def _escapes() -> Iterator[str]:
    from jaxllm.data.template import run

    for expression in ESCAPES:
        messages = [{"role": "user", "content": "hello"}]
        try:
            text = run("{{ " + expression + " }}", {"messages": messages})
        except UserError:
            continue
        # What is not refused must have come to nothing: jinja renders the undefined as an empty text.
        if text.strip() or messages != [{"role": "user", "content": "hello"}]:
            yield f"the template {{{{ {expression} }}}} gave {text[:60]!r}"


def _adapters(lab: Lab) -> Iterator[str]:
    """Adapters whose settings name paths wherever they may hold text: nothing outside their folder is opened."""
    from jaxllm.verify.files import seeds

    folder, readers = seeds(lab)
    secret, config = folder / "secret", folder / "peft/adapter_config.json"
    secret.mkdir()
    for path in (folder / "peft").iterdir():
        (secret / path.name).write_bytes(path.read_bytes())
    whole = json.loads(config.read_text())
    with _opened(secret) as opened:
        for path in (*BASES, str(secret)):
            config.write_text(json.dumps(whole | dict.fromkeys(NAMED, path)))
            with contextlib.suppress(UserError):
                readers["peft/adapter_config.json"]()
            if opened:
                yield f"an adapter that names {path} had {opened[0]} opened"
                opened.clear()


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[list[str]]:
    """The files under a folder that this process opens within the block."""
    opened: list[str] = []
    within = True

    def hook(event: str, args) -> None:  # hooks stay for the life of a process
        if within and event == "open" and isinstance(args[0], (str, os.PathLike)):
            path = os.path.realpath(args[0])
            opened.extend([path] * path.startswith(f"{folder.resolve()}{os.sep}"))

    sys.addaudithook(hook)
    try:
        yield opened
    finally:
        within = False


def _paths(lab: Lab) -> Iterator[str]:
    from jaxllm.hf.safetensors import Tensors

    folder = lab.folder / "outer" / "model"
    (folder / "sub").mkdir(parents=True)
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (folder.parent / "secret.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for path in PATHS:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": path}}))
        try:
            Tensors(folder)
        except UserError:
            continue
        yield f"an index that names {path} was read"
