"""Questions about what a long, forced chain of thought has pushed out of the window.

Every run thinks the same thoughts, so arms differ by what they have forgotten alone: not by luck in
sampling, and also where a model is too small to think that long by itself.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vase_sgl.eval.forced.model import ForcedModel
from vase_sgl.eval.forced.nll import ForcedArm, loss_fields, row_fields

_NAMES = ("alpha", "beta", "gamma", "delta", "kappa", "sigma")
#: Steps of a state-tracking thought; each gives one variable a new value.
_STEPS = 8


@dataclasses.dataclass(frozen=True)
class ForcedItem:
    """Token ids in order: `prompt`, then `thought` and `question` forced, then `answer` scored."""

    task: str
    item_id: str
    prompt: tuple[int, ...]
    thought: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    answer_text: str


def passkey_items(
    name: str, tokenizer: Any, filler: Sequence[int], *, thought_tokens: int, count: int, seed: int
) -> list[ForcedItem]:
    """A five-digit pass key in the prompt, `thought_tokens` of prose, then the key is asked for.

    filler: token ids of the real text called `name`, at least `thought_tokens` of them; each item
        takes a passage of its own. The same arguments give the same items, another name others.
        Raises ValueError.
    """

    def make(rng: random.Random) -> tuple[str, list[int], str, str]:
        key = str(rng.randrange(10_000, 100_000))
        ask = f"The pass key is {key}. Remember it: you will be asked for it after a long thought."
        return ask, _passage(filler, thought_tokens, rng), "\n\nSo the pass key is", f" {key}"

    return _items("passkey-forced", name, tokenizer, make, count, seed)


def state_items(
    name: str, tokenizer: Any, filler: Sequence[int], *, thought_tokens: int, count: int, seed: int
) -> list[ForcedItem]:
    """Six variables, changed one at a time in a thought of prose; one final value is asked for.

    The answer is the variable's last value named in prompt or thought. Arguments and errors as
    `passkey_items`; the thought holds `thought_tokens` of prose and the steps between them.
    """

    def make(rng: random.Random) -> tuple[str, list[int], str, str]:
        values = {name: rng.randrange(10, 100) for name in _NAMES}
        told = ", ".join(f"{name} is {value}" for name, value in values.items())
        prose = _passage(filler, thought_tokens, rng)
        piece = -(-thought_tokens // (_STEPS + 1))
        thought = prose[:piece]
        for step in range(1, _STEPS + 1):
            name = rng.choice(_NAMES)
            values[name] = rng.randrange(10, 100)
            thought += _ids(tokenizer, f"\n\nStep {step}: {name} is now {values[name]}.\n\n")
            thought += prose[step * piece : (step + 1) * piece]
        asked = rng.choice(_NAMES)
        ask = f"At first {told}. Follow the steps and remember the last value of each."
        return ask, thought, f"\n\nThe last value: {asked} is", f" {values[asked]}"

    return _items("state-forced", name, tokenizer, make, count, seed)


def task_rows(
    model: ForcedModel, items: Sequence[ForcedItem], arms: Sequence[ForcedArm], run_id: str
) -> Iterator[dict[str, Any]]:
    """One JSON-able row per item and arm.

    `correct`: greedy decoding gives the answer. `nll_sum`, `nll_tokens`: of the answer's tokens
    alone, which shows a difference where a small model is never right.
    """
    for item in items:
        started, start = time.time(), time.monotonic()
        session = model.start(item.prompt, [arm.params for arm in arms])
        session.force(item.thought + item.question)
        losses, is_greedy = session.answer(item.answer)
        seconds = time.monotonic() - start
        for index, arm in enumerate(arms):
            yield {
                "run_id": run_id,
                "task": item.task,
                "item_id": item.item_id,
                "started": started,
                "total_seconds": seconds,
                "correct": bool(is_greedy[index].all()),
                **row_fields(arm, session.report(index), len(item.prompt)),
                **loss_fields(losses[index]),
            }


def _items(
    task: str,
    name: str,
    tokenizer: Any,
    make: Callable[[random.Random], tuple[str, list[int], str, str]],
    count: int,
    seed: int,
) -> list[ForcedItem]:
    items = []
    for index in range(count):
        item_id = f"{task}/{name}/{seed}/{index}"
        ask, thought, question, answer = make(random.Random(item_id))
        items.append(
            ForcedItem(
                task,
                item_id,
                tuple(_prompt(tokenizer, ask)),
                tuple(thought),
                tuple(_ids(tokenizer, question)),
                tuple(_ids(tokenizer, answer)),
                answer.strip(),
            )
        )
    return items


def _prompt(tokenizer: Any, ask: str) -> list[int]:
    """As a chat, where the model has a template; the answer's turn is open."""
    if tokenizer.chat_template is None:
        return _ids(tokenizer, f"{ask}\n\n")
    messages = [{"role": "user", "content": ask}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _passage(filler: Sequence[int], tokens: int, rng: random.Random) -> list[int]:
    if not 0 < tokens <= len(filler):
        raise ValueError(f"a thought of {tokens} tokens needs a filler as long, got {len(filler)}")
    start = rng.randrange(len(filler) - tokens + 1)
    return list(filler[start : start + tokens])
