"""Ten prompts answered by the teacher, the 4-bit and the 2-bit model, side by side.

    python -m benchmarks.generation                       # needs runs/ of `dvc repro`

Greedy answers. Beside each model: how long they are, how many end by themselves, and the share of
4-grams of tokens that stood before in the same answer. Perplexity and KL are of text that is given;
these are of text the model has to go on from, where a small model falls into a loop and one that
lost too much strings words together. Loops show in the figures, word salad only to a reader.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks import record
from lib.base.files import write_text

MODELS = {
    "teacher": "data/teacher",
    "Q4A4": "runs/finetune/model",
    "Q2A4": "runs/snap/model",
}
PROMPTS = (
    "What is 2+2?",
    "Name three primary colors.",
    "Explain in one sentence why the sky is blue.",
    "Write a short story about a dog that found a key.",
    "What is the capital of France, and what is it known for?",
    "Give me three tips for sleeping better.",
    "Translate to French: I would like a cup of coffee.",
    "Write a Python function that returns the largest of two numbers.",
    "Why do leaves change their color in autumn?",
    "Summarize in two sentences: Bread is made of flour, water, salt and yeast. The dough is left "
    "to rise before it is baked, which makes it light.",
)
GRAM = 4


def repeated(ids: list[int], gram: int = GRAM) -> float:
    """Share of an answer's n-grams that stood before in it; 0 where it is too short to have any."""
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answers_of(folder: Path, new_tokens: int) -> dict[str, Any]:
    """A model's answers, and their figures."""
    from lib.evaluate.generate import baked, chat_ids, generate_tokens
    from lib.model.folders import load_any
    from lib.model.load import load_tokenizer

    model, _ = load_any(folder)
    tokenizer = load_tokenizer(folder)
    rows = [chat_ids(tokenizer, prompt) for prompt in PROMPTS]
    with baked(model):
        output = generate_tokens(model, tokenizer, rows, new_tokens, seed=0, temperature=0.0)
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output]
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    lengths = [len(row) for row in ids]
    return {
        "texts": texts,
        "tokens": lengths,
        "repeated": [repeated(row) for row in ids],
        "ended": [length < new_tokens - 1 for length in lengths],
    }


def figures_of(answers: dict[str, Any]) -> dict[str, float]:
    """Means over the prompts."""
    return {key: statistics.mean(answers[key]) for key in ("tokens", "repeated", "ended")}


def to_markdown(found: dict[str, dict[str, Any]], new_tokens: int) -> str:
    """The figures, then every answer."""
    lines = [
        f"| model | tokens (at most {new_tokens}) | ended | repeated 4-grams |",
        "| --- | --- | --- | --- |",
    ]
    for model, answers in found.items():
        mean = figures_of(answers)
        cells = [model, f"{mean['tokens']:.0f}", f"{mean['ended']:.0%}", f"{mean['repeated']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    for number, prompt in enumerate(PROMPTS):
        lines += ["", f"### {prompt}"]
        for model, answers in found.items():
            quoted = answers["texts"][number].strip().replace("\n", "\n> ")
            lines += [
                "",
                f"**{model}** ({answers['repeated'][number]:.0%} repeated)",
                "",
                f"> {quoted}",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Let every model answer, and write ``results/generation.json`` and ``.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--folder", type=Path, default=Path(), help="where data/ and runs/ are")
    options = parser.parse_args()
    on = record.machine()
    found = {
        name: answers_of(options.folder / folder, options.new_tokens)
        for name, folder in MODELS.items()
    }
    write_text(record.RESULTS / "generation.md", to_markdown(found, options.new_tokens))
    summary = {
        f"{name}_{key}": value
        for name, answers in found.items()
        for key, value in figures_of(answers).items()
    }
    config = {"prompts": list(PROMPTS), "new_tokens": options.new_tokens, "gram": GRAM}
    record.save("generation", config=config, samples=found, summary=summary, on=on)


if __name__ == "__main__":
    main()
