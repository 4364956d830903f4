"""The README says what the repository holds: its results are those that were printed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import lib.api

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(marker: str) -> str:
    """The README's text between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", README, re.DOTALL)
    assert found is not None, marker
    return found.group(1).strip()


def test_results_are_the_ladder_that_evaluate_wrote() -> None:
    assert between("ladder") == (ROOT / "runs/evaluate/ladder.md").read_text().strip()


def test_api_example_is_the_one_that_is_tested() -> None:
    assert lib.api.__doc__ is not None
    _, *blocks = lib.api.__doc__.split("\n\n")
    indented = [block for block in blocks if block.startswith("    ")]
    code = textwrap.dedent("\n\n".join(indented)).strip()
    assert between("api") == f"```python\n{code}\n```"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
