from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lib.text.split import SPLITS, split_of

FRACTIONS = st.floats(0.0, 0.49)


@given(st.text(), FRACTIONS, FRACTIONS)
def test_case_and_white_space_do_not_matter(title: str, val: float, test: float) -> None:
    split = split_of(title, val, test)
    assert split in SPLITS
    assert split == split_of(f"  {title}\n", val, test)
    assert split_of("Ab C", val, test) == split_of("aB\tc", val, test)


@given(st.text(), FRACTIONS, FRACTIONS, FRACTIONS)
def test_more_validation_never_takes_from_test(
    title: str, val: float, more: float, test: float
) -> None:
    before, after = split_of(title, val, test), split_of(title, more, test)
    assert (before == "test") == (after == "test")
    if more >= val and before == "val":
        assert after == "val"


def test_fractions_are_shares() -> None:
    count = Counter(split_of(f"title {i}", 0.2, 0.1) for i in range(5000))
    # Binomial, 5000 draws: 5 standard deviations are 106 (test) and 141 (val).
    assert abs(count["test"] - 500) < 106
    assert abs(count["val"] - 1000) < 141


def test_golden() -> None:
    """The split must never change under a user's feet: the hash is fixed here."""
    titles = ["Harbour", "Rope", "Salt", "Tide", "Glass", "Bridge", "Moon", "Bread"]
    found = [split_of(title, 0.3, 0.3) for title in titles]
    assert found == ["train", "train", "val", "val", "test", "test", "train", "val"]
