"""Mutated params.yaml files: what is valid is accepted and arrives, what is not is refused in one
line that names the key, says an oracle of its own (tests/faults/oracle.py); never a traceback."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from lib.base.errors import ParamsError
from lib.params.load import PARAMS_FILE, known_keys, load_params, parse_params
from lib.params.schema import Params
from tests.faults.counts import SEED, dice, often
from tests.faults.lines import said
from tests.faults.oracle import Leaf, Schema, rates_train
from tests.params.samples import SMALLEST
from tests.pipeline.project import ROOT

SCHEMA = Schema()
DEFAULTS: dict[str, Any] = parse_params(SMALLEST).model_dump(mode="json")
"""Every key with its default."""
TEXT = (ROOT / PARAMS_FILE).read_text(encoding="utf-8")

Path_ = tuple[str | int, ...]


def fuzz(short: int, long: int) -> Any:
    """Settings of a test that always tries the same."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=often(short, long),
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )


def owner(values: Any, path: Path_) -> Any:
    """The container that a path ends in."""
    for part in path[:-1]:
        values = values[part]
    return values


def arrived(params: Params, path: Path_) -> Any:
    """The value of a key after validation."""
    value: Any = params
    for part in path:
        value = value[part] if isinstance(part, int) else getattr(value, part)
    return value


def outcome(values: Any) -> tuple[Params | None, str]:
    """The params, or the one line that refuses them."""
    params, line, code = said(lambda: parse_params(values))
    assert code in (0, ParamsError.exit_code)
    if code:
        assert re.fullmatch(r"error: params\.yaml[^\n]+\n", line), line
    return params, line


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([10**400, -(10**30), 2**63, 1e308, 5e-324, -0.0, [[[]]], {"a": {"b": 1}}]),
)


@seed(SEED)
@fuzz(700, 2000)
@given(leaf=st.sampled_from(SCHEMA.leaves), data=st.data())
def test_values(leaf: Leaf, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(leaf.near()) | odd)
    values = copy.deepcopy(DEFAULTS)
    owner(values, leaf.path)[leaf.path[-1]] = value
    params, line = outcome(values)
    permitted = leaf.permits(value)
    if permitted is False:
        assert params is None and leaf.key in line, (leaf, value, line)
    if permitted and leaf.free:
        assert params is not None, (leaf, value, line)
        assert arrived(params, leaf.path) == value


@pytest.mark.parametrize("leaf", SCHEMA.leaves, ids=lambda leaf: leaf.key)
def test_a_key_left_out(leaf: Leaf) -> None:
    values = copy.deepcopy(DEFAULTS)
    del owner(values, leaf.path)[leaf.path[-1]]
    params, line = outcome(values)
    if not leaf.has_default:
        assert params is None and f"{leaf.key} is missing" in line
    elif not rates_train(values, leaf.path):
        assert params is None and "every role is frozen" in line
    else:
        assert params is not None, line
        assert "rates" in leaf.path or params == parse_params(DEFAULTS)


@pytest.mark.parametrize("path", SCHEMA.sections, ids=".".join)
def test_a_section_left_out_or_something_else(path: Path_) -> None:
    for value in (None, 3, "x", [], [{}], True):
        values = copy.deepcopy(DEFAULTS)
        owner(values, path)[path[-1]] = value
        params, line = outcome(values)
        assert params is None and ".".join(map(str, path)) in line, value
    values = copy.deepcopy(DEFAULTS)
    del owner(values, path)[path[-1]]
    params, line = outcome(values)
    assert (params is not None) is SCHEMA.sections[path], line
    assert params == parse_params(DEFAULTS) or f"{path[-1]} is missing" in line


names = st.text(min_size=1, max_size=12) | st.sampled_from(
    sorted({name[:-1] + "x" for key in known_keys() for name in key.split(".")})
)


@seed(SEED)
@fuzz(200, 1000)
@given(path=st.sampled_from([(), *SCHEMA.sections]), name=names, value=odd)
def test_unknown_keys(path: Path_, name: str, value: Any) -> None:
    values = copy.deepcopy(DEFAULTS)
    section = owner(values, (*path, name))
    assume(name not in section)
    section[name] = value
    params, line = outcome(values)
    key = " ".join(".".join(map(str, (*path, name))).split())
    assert params is None and "is not a known key" in line
    assert key.encode("ascii", "replace") in line.encode("ascii", "replace")


@seed(SEED)
@fuzz(100, 500)
@given(
    st.recursive(
        odd | st.integers() | st.dates() | st.tuples(st.integers()),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(list(SMALLEST))
                | st.integers()
                | st.none()
                | st.tuples(st.integers()),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_anything_that_yaml_can_hold(values: Any) -> None:
    """Keys that are no words, dates, nesting: refused, never raised."""
    params, line = outcome({**SMALLEST, **values} if isinstance(values, dict) else values)
    assert params is None or not line


def test_values_without_an_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    laughs: list[Any] = ["ha"]
    for _ in range(60):  # 2**60 strings, if anybody wrote them out
        laughs = [laughs, laughs]
    for value in (endless, laughs, {(1, 2): 3}, {"quant": endless}, 16**5000, [16**5000]):
        for path in (("quant", "rank"), ("teacher", "source"), ("tokens", "train"), ("quant",)):
            values = copy.deepcopy(DEFAULTS)
            owner(values, path)[path[-1]] = value
            params, line = outcome(values)
            assert (params is not None or path[0] in line) and len(line) < 1000


# --- the file's text ----------------------------------------------------------------------------

TOKENS = (
    *("!!bool maybe", "!!int x", "!!float x", "!!timestamp x", "!!set x", "!!python/name:os.x"),
    *(
        "&a [*a]",
        "*nobody",
        "<<: 3",
        "? [1]",
        "2001-99-99",
        "12:99:99",
        "1e999",
        "0x",
        "0o9",
        "1_0",
    ),
    *(
        ".inf",
        "-.nan",
        "~",
        "{",
        "}",
        "[",
        "\t",
        "\x00",
        "\ufeff",
        "\x85",
        "%YAML 9.9",
        "---",
        "...",
    ),
    *(
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 3000,
        "|",
        ">-",
        "'",
        '"',
        "@",
        "`",
        "? ",
        "- -",
        "\ud800",
    ),
)


def mutate_text(chance: random.Random, text: str) -> str:
    """One change of a file's text."""
    lines = text.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    how = chance.choice(("token", "value", "character", "drop", "double", "indent", "cut", "swap"))
    if how == "token":
        lines.insert(at, chance.choice(TOKENS) + "\n")
    elif how == "value":
        lines[at] = lines[at].split(":")[0] + ": " + chance.choice(TOKENS) + "\n"
    elif how == "character":
        place = chance.randrange(len(lines[at]))
        odd_one = chance.choice(":-[]{}#&*!|>'\"%@`\t\x07é\U0001f600 ")
        lines[at] = lines[at][:place] + odd_one + lines[at][place + 1 :]
    elif how == "drop":
        del lines[at]
    elif how == "double":
        lines.insert(at, lines[at])
    elif how == "indent":
        lines[at] = " " * chance.randrange(1, 4) + lines[at]
    elif how == "cut":
        return text[: chance.randrange(len(text))]
    else:
        other = chance.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return "".join(lines)


@pytest.mark.parametrize("part", range(10))
def test_the_files_text(tmp_path: Path, part: int) -> None:
    """Accepted, or refused in one line; a text with the same values gives the same params."""
    file = tmp_path / PARAMS_FILE
    bare = "\n".join(line for line in TEXT.splitlines() if line.split("#")[0].strip())
    for number in range(often(10, 60)):
        chance = dice("text", part, number)
        text = mutate_text(chance, bare)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        params, line, code = said(lambda: load_params(file))
        assert code in (0, ParamsError.exit_code), (part, number, line)
        assert params is not None or re.fullmatch(r"error: [^\n]*params\.yaml[^\n]+\n", line), line


def test_the_same_values_in_another_form(tmp_path: Path) -> None:
    file = tmp_path / PARAMS_FILE
    file.write_text(TEXT)
    expected = load_params(file)
    values = expected.model_dump(mode="json")
    shuffled = dict(sorted(values.items(), key=lambda _: dice("order").random()))
    for text in (
        "# first\n\n" + TEXT.replace("\n", "   # said\n"),
        TEXT.replace("\n", "\r\n"),
        "---\n" + TEXT + "\n...\n",
        json.dumps(values, indent=1),
        json.dumps(shuffled),
    ):
        file.write_bytes(text.encode())
        assert load_params(file) == expected


def test_a_folder_or_nothing_in_its_place(tmp_path: Path) -> None:
    file = tmp_path / PARAMS_FILE
    for words in ("does not exist", "a folder is where a file should be"):
        _, line, code = said(lambda: load_params(file))
        assert code and words in line and line.count("\n") == 1
        file.mkdir(exist_ok=True)


def test_the_oracle_knows() -> None:
    """Negative control: it says what the schema's authors wrote."""
    leaves = {leaf.key: leaf for leaf in SCHEMA.leaves}
    assert leaves.keys() >= {"quant.rank", "scales.rates.lut", "tokens.train.0.source", "run.wandb"}
    rank, share = leaves["quant.rank"], leaves["ane_check.min_top1"]
    assert [rank.permits(value) for value in (0, 1, True, 1.0, "1", None)] == [False, True] + [
        False
    ] * 4
    assert [share.permits(value) for value in (0, 1, 1.5, -0.1, float("nan"))] == [
        *(True, True),
        *(False, False, False),
    ]
    assert leaves["quant.lut_size"].permits(3) is False and leaves["run.wandb"].permits(None)
    assert not leaves["teacher.source"].has_default and leaves["quant.rank"].has_default
    assert sum(leaf.free for leaf in leaves.values()) > 60
