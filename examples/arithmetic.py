"""Sums to fine-tune on, and preferences between right answers and wrong ones.

    python examples/arithmetic.py runs/arithmetic
    jaxllm sft runs/demo --data runs/arithmetic/chats.jsonl out=runs/sums optim.lr=1e-3
    jaxllm dpo dpo train.init=runs/sums data.sources.0.path=runs/arithmetic/pairs.jsonl optim.lr=3e-4 dpo.beta=0.5

A wrong answer has one digit changed, so that it is as long as the right one. It is the right answer of another
question, whose wrong answer is this one's right one: over a file each answer is chosen as often as it is rejected, and
whoever does not read the question is right in half of the pairs. Held-out questions have operands that no other one
has, in either order.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SMALLEST, LARGEST = 10, 99
Sum = tuple[int, int]


def main(out: str, train: int = 6000, heldout: int = 600, seed: int = 0) -> None:
    """Writes conversations (`chats.jsonl`), pairs on the same questions (`pairs.jsonl`), and `heldout.jsonl`."""
    folder, rng = Path(out), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(SMALLEST, LARGEST + 1)
    sums = [(a, b) for a in numbers for b in numbers if a <= b]
    rng.shuffle(sums)
    # A sum makes two questions, but not every question finds its partner.
    pairs, others = (list(preferences(part, rng)) for part in (sums[heldout:], sums[:heldout]))
    if len(pairs) < train or len(others) < heldout:
        raise ValueError(f"train={train}, heldout={heldout}: there are {len(pairs)} and {len(others)} pairs")
    for name, lines in {"chats": map(chat, pairs[:train]), "pairs": pairs[:train], "heldout": others[:heldout]}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{out}: {train:,} conversations, as many pairs, and {heldout:,} held out")


def preferences(sums: list[Sum], rng: random.Random) -> Iterator[dict[str, str]]:
    """Pairs on the questions `a + b` and `b + a` of the sums, two at a time: what one chooses the other rejects."""
    questions = sorted({*sums, *((b, a) for a, b in sums)})
    rng.shuffle(questions)
    waiting: dict[int, list[Sum]] = {}
    for question in questions:
        waiting.setdefault(sum(question), []).append(question)
    for question in questions:
        right = sum(question)
        if question not in waiting[right]:
            continue  # the partner of an earlier one
        waiting[right].remove(question)
        if partners := [wrong for wrong in perturbed(right) if waiting.get(wrong)]:
            wrong = rng.choice(partners)
            yield preference(question, right, wrong)
            yield preference(waiting[wrong].pop(), wrong, right)


def perturbed(answer: int) -> list[int]:
    """All numbers that differ from the answer in one digit, and begin with none."""
    digits = str(answer)
    changed = {digits[:i] + digit + digits[i + 1 :] for i in range(len(digits)) for digit in "0123456789"}
    return sorted(int(text) for text in changed - {digits} if text[0] != "0")


def preference(question: Sum, right: int, wrong: int) -> dict[str, str]:
    a, b = question
    return {"prompt": f"What is {a} + {b}?", "chosen": str(right), "rejected": str(wrong)}


def chat(pair: dict[str, str]) -> dict[str, str]:
    """The conversation with the right answer."""
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/arithmetic"])
