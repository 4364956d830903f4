"""generate and chat."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.evaluate.samples import generate_texts
from lib.model.folders import load_any
from lib.model.load import load_tokenizer
from tests.cli.run import lutqat

KINDS = ("teacher", "trained", "snapped", "baked")


def answer(folder: Path, prompt: str, tokens: int) -> str:
    return generate_texts(load_any(folder)[0], load_tokenizer(folder), [prompt], tokens)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_answers(models: Path, kind: str) -> None:
    outcome = lutqat("generate", models / kind, "Hi", "--max-tokens", 9, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.out == answer(models / kind, "Hi", 9) + "\n"


def test_several_prompts_are_told_apart(models: Path) -> None:
    folder = models / "snapped"
    outcome = lutqat("generate", folder, "Hi", "You", "--max-tokens", 4)
    one, two = (answer(folder, prompt, 4) for prompt in ("Hi", "You"))
    assert outcome.out == f"> Hi\n{one}\n\n> You\n{two}\n"


def test_drawing_is_seeded_and_raw_leaves_the_template_out(models: Path) -> None:
    def run(*options: object) -> str:
        return lutqat("generate", models / "teacher", "Hi", "--max-tokens", 12, *options).out

    drawn = run("--temperature", 1, "--seed", 5)
    assert drawn == run("--temperature", 1, "--seed", 5)
    assert drawn != run("--temperature", 1, "--seed", 6)
    assert run() == run("--seed", 6)  # nothing is drawn at temperature 0
    assert run("--raw") != run()


def test_bad_requests(models: Path) -> None:
    lutqat("generate", models / "teacher", "", "--raw").refused_with(3, "the prompt is empty")
    lutqat("generate", models / "teacher", "Hi", "--max-tokens", 9999).refused_with(3, "2048")
    lutqat("generate", models / "teacher", "Hi", "--device", "abacus").refused_with(2, "abacus")


def test_chat_keeps_and_forgets_history(models: Path) -> None:
    def talk(*lines: str) -> list[str]:
        outcome = lutqat(
            "chat", models / "teacher", "--max-tokens", 6, typed="".join(f"{x}\n" for x in lines)
        )
        assert outcome.code == 0, outcome.err
        first, *rest = outcome.out.split("\n")
        assert "/reset" in first
        return rest

    fresh = answer(models / "teacher", "Hi", 6)
    assert fresh in "\n".join(talk("Hi"))
    twice = "\n".join(talk("Hi", "", "Hi", "/quit", "Hi"))
    assert twice.startswith(fresh)
    assert twice.count(fresh) == 1  # the second answer has seen the first
    assert "\n".join(talk("Hi", "/reset", "Hi")).count(fresh) == 2


def test_chat_drops_the_oldest_turns(models: Path) -> None:
    long = "x" * 900
    typed = f"{long}\n{long}\n{long}\n"
    outcome = lutqat("chat", models / "teacher", "--max-tokens", 4, typed=typed)
    assert outcome.code == 0, outcome.err
    assert "1 oldest turns" in outcome.err


def test_chat_needs_a_template(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "teacher", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    lutqat("chat", tmp_path / "plain").refused_with(3, "no chat template")
    outcome = lutqat("generate", tmp_path / "plain", "Hi", "--max-tokens", 3)
    assert (
        outcome.out == lutqat("generate", tmp_path / "plain", "Hi", "--max-tokens", 3, "--raw").out
    )
