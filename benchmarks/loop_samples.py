"""Answers of SmolLM2-135M-Instruct for labelling by hand: which of them end in a loop?

    python benchmarks/loop_samples.py [--held-out] > samples.jsonl

Plain transformers. A small model loops by itself under greedy decoding, more with a small cache,
and seldom when it samples. `tests/eval/data/loops.jsonl` was labelled from this output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

PROMPTS = (
    "Explain step by step how to compute 37 * 24.",
    "List the prime numbers below 100 and say why each of them is prime.",
    "Write a poem about the sea in winter.",
    "Count from 1 to 60, one number a line.",
    "Write a Python class for a bank account with deposit and withdraw.",
    "Tell a long story about a lighthouse keeper and his daughter.",
    "What are the causes of the French Revolution? Think carefully first.",
    "Solve x^2 - 5x + 6 = 0 and check your answer several times.",
    "Give me 30 names for a cat.",
    "Work through this: a = 3, b = a + 4, c = b * 2, a = c - b. What is a?",
    "Make a table of the planets with their distance from the sun.",
    "Describe how bread is baked, in great detail.",
    "Prove that the square root of 2 is irrational.",
    "Translate 'good morning' into ten languages.",
    "Write a dialogue between two robots who disagree.",
    "Why is the sky blue? Explain to a child, then to a physicist.",
)
#: Asked after the thresholds of the detector were set.
HELD_OUT_PROMPTS = (
    "Explain how a bicycle works.",
    "Write a recipe for tomato soup with exact amounts.",
    "What is 15% of 80? Show every step.",
    "Write a letter to a friend about a trip to the mountains.",
    "List the months of the year with their number of days.",
    "Write a Python function that sorts a list, and explain it line by line.",
    "Who was Marie Curie?",
    "Think aloud about whether 91 is a prime number.",
    "Write a song with a chorus about the rain.",
    "Compare cats and dogs as pets.",
    "Describe the water cycle in simple words.",
    "Tell me a riddle, then solve it.",
)
NEW_TOKENS = 320
#: A harsh budget: the first and the most recent tokens.
SINKS, RECENT = 4, 60


def main(held_out: bool) -> None:
    import torch

    from vase_sgl.demo.model import ensure_model
    from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

    declare_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = HELD_OUT_PROMPTS if held_out else PROMPTS
    folder = ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in asked
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)

    def generate(**arguments: Any) -> Any:
        torch.manual_seed(0)
        output = model.generate(**batch, max_new_tokens=NEW_TOKENS, **arguments)
        return output[:, batch["input_ids"].shape[1] :]

    decoding: dict[str, Callable[[], Any]] = {
        "greedy": lambda: generate(do_sample=False),
        "temperature 0.4": lambda: generate(do_sample=True, temperature=0.4),
        f"greedy, KV cache of {SINKS} first and {RECENT} recent tokens": lambda: (
            greedy_with_small_cache(model, batch)
        ),
    }
    if held_out:
        del decoding["temperature 0.4"]
    for label, decode in decoding.items():
        with torch.inference_mode():
            answers = decode()
        for prompt, answer in zip(asked, answers.tolist(), strict=True):
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            row = {"source": f"SmolLM2-135M-Instruct, {label}: {prompt}", "text": text}
            print(json.dumps(row), flush=True)


def greedy_with_small_cache(model: Any, batch: Any) -> Any:
    """NEW_TOKENS greedy tokens int64 [batch, NEW_TOKENS]; the cache keeps SINKS + RECENT."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens, answers = batch["input_ids"], []
    for _ in range(NEW_TOKENS):
        output = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        tokens = output.logits[:, -1:].argmax(-1)
        answers.append(tokens)
        positions = positions[:, -1:] + 1
        if mask.shape[1] > SINKS + RECENT:
            keep = [*range(SINKS), *range(mask.shape[1] - RECENT, mask.shape[1])]
            mask = mask[:, keep]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return torch.cat(answers, 1)


if __name__ == "__main__":
    main(held_out="--held-out" in sys.argv[1:])
