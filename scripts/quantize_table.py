"""The README's table of number formats: size, loss of quality and greedy agreement of one model in each of them.

    python scripts/quantize_table.py MODEL --eval TEXT [--calibrate TEXT] [--tables] [--formats NAME ...]

MODEL is a run folder or a published model; TEXT is a file, a glob, or python-stdlib:train and python-stdlib:heldout.
Without --calibrate GPTQ and AWQ are left out. A line is printed as soon as it is there.
"""

import argparse
import sys

import jaxllm
from jaxllm import api, tree
from jaxllm.adapt.quantize import LAYERS, TABLES, QuantizeConfig, quantize_plan
from jaxllm.errors import SettingsError
from jaxllm.model.change import changed

#: name: (settings of the rule, activations)
FORMATS = {
    "int8 per channel": ({"format": "int8"}, None),
    "int8 per channel, int8 activations (w8a8)": ({"format": "int8"}, "int8"),
    "int8 per channel, int8 activations, AWQ": ({"format": "int8", "method": "awq"}, "int8"),
    "fp8 (e4m3)": ({"format": "fp8"}, None),
    "int4, groups of 128": ({"format": "int4", "group": 128}, None),
    "int4, groups of 64": ({"format": "int4", "group": 64}, None),
    "int4, groups of 64, GPTQ": ({"format": "int4", "group": 64, "method": "gptq"}, None),
    "int4, groups of 64, AWQ": ({"format": "int4", "group": 64, "method": "awq"}, None),
    "int4, groups of 32": ({"format": "int4", "group": 32}, None),
    "nf4, groups of 64": ({"format": "nf4", "group": 64}, None),
    "nf4, groups of 64, scales in 8 bits": ({"format": "nf4", "group": 64, "double": True}, None),
    "nf4, groups of 64, GPTQ": ({"format": "nf4", "group": 64, "method": "gptq"}, None),
    "int2, groups of 32": ({"format": "int2", "group": 32}, None),
    "int2, groups of 32, GPTQ": ({"format": "int2", "group": 32, "method": "gptq"}, None),
}


def config_of(name: str, tables: bool) -> QuantizeConfig:
    rule, activations = FORMATS[name]
    plain = {key: value for key, value in rule.items() if key != "method"}
    rules = [{"pattern": TABLES, **plain}] * tables + [{"pattern": LAYERS, **rule}]
    return QuantizeConfig(rules=tuple(rules), activations=activations)


def fits(loaded: api.Loaded, config: QuantizeConfig) -> bool:
    """Whether the groups divide the model's matrices."""
    try:
        changed(loaded.model, quantize_plan(loaded.model, config))
    except SettingsError as error:
        print(f"{error}; left out", file=sys.stderr)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--eval", required=True)
    parser.add_argument("--calibrate")
    parser.add_argument("--tables", action="store_true", help="embedding and head too")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="NAME")
    args = parser.parse_args()
    loaded = jaxllm.load(args.model)
    print(
        "| weights | MB | smaller | perplexity | | bits per byte | same greedy token |\n|---|---|---|---|---|---|---|"
    )
    before, first = tree.nbytes(loaded.params), True
    for name in args.formats:
        config = config_of(name, args.tables)
        if (config.calibrated and args.calibrate is None) or not fits(loaded, config):
            continue
        smaller, _ = api.quantize(loaded, config, args.calibrate if config.calibrated else None)
        found = api.compare(loaded, smaller, args.eval, seq_len=args.seq_len)
        if first:
            line("float32", before, before, found, "before")
        line(name, before, tree.nbytes(smaller.params), found, "after")
        first = False


def line(name: str, before: int, size: int, found: dict, when: str) -> None:
    perplexity, bits = found["perplexity"], found["bits_per_byte"][when]
    change = "" if when == "before" else f"{perplexity[when] / perplexity['before'] - 1:+.2%}"
    same = "" if when == "before" else f"{found['greedy_agreement']:.1%}"
    cells = (name, f"{size / 1e6:.1f}", f"{before / size:.2f}x", f"{perplexity[when]:.3f}", change, f"{bits:.4f}", same)
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
