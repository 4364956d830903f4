"""Figures of generated text."""

from __future__ import annotations

import pytest

from benchmarks.generation import PROMPTS, figures_of, repeated, to_markdown


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4, 5], 0.0),
        ([7] * 8, 0.8),  # five grams, all the same
        ([1, 2, 3, 4] * 3, 5 / 9),  # nine grams, four different ones
    ],
)
def test_repeated_grams(ids: list[int], share: float) -> None:
    assert repeated(ids) == pytest.approx(share)


def test_every_answer_of_every_model_is_shown() -> None:
    found = {
        name: {
            "texts": [f"{name} says {n}\nand more" for n in range(len(PROMPTS))],
            "tokens": [10] * len(PROMPTS),
            "repeated": [0.0] * (len(PROMPTS) - 1) + [0.5],
            "ended": [True] * (len(PROMPTS) - 1) + [False],
        }
        for name in ("teacher", "Q2A4")
    }
    assert len(PROMPTS) == 10
    assert figures_of(found["Q2A4"]) == {"tokens": 10, "repeated": 0.05, "ended": 0.9}
    page = to_markdown(found, 96)
    assert "| Q2A4 | 10 | 90% | 5% |" in page
    for number, prompt in enumerate(PROMPTS):
        assert f"### {prompt}" in page
        assert f"> teacher says {number}\n> and more" in page
    assert "**Q2A4** (50% repeated)" in page
