"""Answers of SmolLM2-135M-Instruct for labelling by hand: which of them end in a loop?

    python benchmarks/loop_samples.py > samples.jsonl

Plain transformers, no eviction. A small model loops by itself under greedy decoding, and seldom
when it samples. `tests/eval/data/loops.jsonl` was labelled from this output.
"""

from __future__ import annotations

import json
import sys

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
NEW_TOKENS = 320
#: (label, generation arguments)
DECODING = (
    ("greedy", {"do_sample": False}),
    ("temperature 0.4", {"do_sample": True, "temperature": 0.4}),
    ("temperature 0.9", {"do_sample": True, "temperature": 0.9}),
)


def main() -> None:
    import torch

    from vase_sgl.demo.model import ensure_model
    from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

    declare_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    for label, arguments in DECODING:
        torch.manual_seed(0)
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=NEW_TOKENS, **arguments)
        answers = output[:, batch["input_ids"].shape[1] :]
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            row = {"source": f"SmolLM2-135M-Instruct, {label}: {prompt}", "text": text}
            print(json.dumps(row), flush=True)
        print(label, file=sys.stderr)


if __name__ == "__main__":
    main()
