"""The structure of the repository, and that the checks of it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.params.schema import Params
from tests import architecture as check

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return check.load_yaml(ROOT / "dvc.yaml")["stages"]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return check.import_graph(ROOT)


def write(root: Path, files: dict[str, str]) -> Path:
    """A synthetic repository."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


class TestThisRepository:
    def test_imports_go_up_only(self, graph: dict[str, set[str]]) -> None:
        assert check.layer_violations(graph) == []

    def test_no_cycles(self, graph: dict[str, set[str]]) -> None:
        assert check.cycles(graph) == []

    def test_init_files_are_empty(self) -> None:
        assert check.filled_inits(ROOT) == []

    def test_nothing_is_too_long(self) -> None:
        assert check.size_violations(ROOT) == []

    def test_stages_depend_on_what_they_import(self, stages: dict[str, Any]) -> None:
        assert check.dependency_violations(ROOT, stages) == []

    def test_one_word_in_four_places(self, stages: dict[str, Any]) -> None:
        assert check.naming_violations(ROOT, stages, Params.model_fields) == []

    def test_outputs_do_not_overlap(self, stages: dict[str, Any]) -> None:
        assert check.overlapping_outputs(stages) == []

    def test_git_keeps_what_dvc_does_not(self, stages: dict[str, Any]) -> None:
        ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
        assert check.misplaced_outputs(ignored, stages) == []

    def test_every_key_is_declared_but_run(self, stages: dict[str, Any]) -> None:
        assert check.undeclared_keys(check.load_yaml(ROOT / "params.yaml"), stages) == []

    def test_test_text_reaches_no_training(self, stages: dict[str, Any]) -> None:
        assert "data/tokens/test" in check.outputs_of(stages["tokens"])
        assert check.leaks_of_test_text(stages, "data/tokens/test") == []

    def test_readme_shows_the_tree(self) -> None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        assert check.tree_violations(ROOT, check.readme_tree(text)) == []


def test_lazy_relative_and_dynamic_imports_count(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "lib/__init__.py": "",
            "lib/base/a.py": "def f():\n    import lib.base.b\n",
            "lib/base/b.py": "from . import c\nfrom .d import x\n",
            "lib/base/c.py": "import importlib\nimportlib.import_module('lib.base.d')\n",
            "lib/base/d.py": "from lib.base import a\nx = 1\n",
            "stages/one.py": "from importlib import import_module\nimport_module('lib.base.a')\n",
        },
    )
    assert check.import_graph(tmp_path) == {
        "lib": set(),
        "lib.base.a": {"lib.base.b"},
        "lib.base.b": {"lib.base.c", "lib.base.d"},
        "lib.base.c": {"lib.base.d"},
        "lib.base.d": {"lib.base.a"},
        "stages.one": {"lib.base.a"},
    }


@pytest.mark.parametrize(
    ("module", "imported", "broken"),
    [
        ("lib.quant.a", "lib.base.b", False),
        ("lib.quant.a", "lib.quant.b", False),
        ("lib.quant.a", "lib.distill.b", True),
        ("lib.quant.a", "lib.train.b", True),
        ("lib.train.a", "lib.model.b", False),
        ("lib.train.a", "lib.convert.b", True),
        ("lib.train.a", "lib.api", True),
        ("lib.cli.a", "lib.train.b", False),
        ("lib.cli.a", "lib.api", True),
        ("stages.a", "lib.train.b", False),
        ("stages.a", "stages.b", True),
        ("stages.a", "lib.cli.main", True),
        ("lib.train.a", "stages.b", True),
        ("lib.utils.a", "lib.base.b", True),
    ],
)
def test_layers_are_checked(module: str, imported: str, broken: bool) -> None:
    assert bool(check.layer_violations({module: {imported}})) == broken


def test_cycles_are_found() -> None:
    assert check.cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]
    assert check.cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_long_code_and_filled_inits_are_found(tmp_path: Path) -> None:
    body = "    pass\n"
    write(
        tmp_path,
        {
            "lib/a.py": "def f():\n" + body * 79,
            "lib/b.py": "def f():\n" + body * 78,
            "lib/long.py": "x = 1\n" * 400,
            "lib/__init__.py": "x = 1\n",
            "stages/s.py": "x = 1\n" * 61,
            "stages/t.py": "x = 1\n" * 60,
        },
    )
    found = check.size_violations(tmp_path)
    assert [line.split(":")[0] for line in found] == ["lib/a.py", "lib/long.py", "stages/s.py"]
    assert check.filled_inits(tmp_path) == ["lib/__init__.py"]


def test_undeclared_and_idle_code_deps_are_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "stages/a.py": "from lib.train import loop\n",
            "lib/train/loop.py": "def f():\n    from lib.quant.ste import g\n",
            "lib/quant/ste.py": "",
            "lib/text/x.py": "",
        },
    )
    good = {"a": {"deps": ["data/teacher", "stages/a.py", "lib/train", "lib/quant/ste.py"]}}
    assert check.dependency_violations(tmp_path, good) == []
    bad = {"a": {"deps": ["stages/a.py", "lib/train", "lib/text"]}}
    assert check.dependency_violations(tmp_path, bad) == [
        "a: imports lib/quant/ste.py, which its deps do not cover",
        "a: depends on lib/text but imports nothing of it",
    ]


def test_names_are_compared_both_ways(tmp_path: Path) -> None:
    write(tmp_path, {"stages/a.py": "", "stages/c.py": ""})
    stages = {
        "a": {"cmd": "python -m stages.a runs/a", "outs": ["runs/a/model"]},
        "b": {"cmd": "python -m stages.a runs/b", "metrics": [{"runs/a/m.json": {}}]},
    }
    found = check.naming_violations(tmp_path, stages, ["a", "d", "distill"])
    assert [line.split(":")[0] for line in found] == ["b", "c", "b", "d", "b", "b"]
    good = {"a": stages["a"]}
    (tmp_path / "stages/c.py").unlink()
    assert check.naming_violations(tmp_path, good, ["a", "distill"]) == []


def test_overlaps_are_found() -> None:
    apart = {"a": {"outs": ["data/a/x"], "metrics": [{"data/a/m.json": {"cache": False}}]}}
    assert check.overlapping_outputs(apart) == []
    assert check.overlapping_outputs({**apart, "b": {"plots": ["data/a/x/log.csv"]}})
    assert check.overlapping_outputs({**apart, "b": {"outs": ["data/a/x"]}})


def test_outputs_kept_nowhere_or_twice_are_found() -> None:
    git = {"runs/a/metrics.json": {"cache": False}}
    stages = {"a": {"outs": ["runs/a/model"], "metrics": [git], "plots": [{"runs/a/x.csv": {}}]}}
    ignored = ["/runs/*/*", "!/runs/*/metrics.json"]
    assert check.misplaced_outputs(ignored, stages) == []
    assert check.misplaced_outputs(ignored[:1], stages) == ["runs/a/metrics.json: kept nowhere"]
    kept = [*ignored, "!/runs/*/model"]
    assert check.misplaced_outputs(kept, stages) == ["runs/a/model: kept twice"]


def test_undeclared_keys_are_found() -> None:
    values = {"quant": {"rank": 1, "group_size": 2}, "snap": {"form": "lut"}, "run": {"x": 1}}
    stages = {"scales": {"params": ["quant.rank"]}, "snap": {"params": ["snap"]}}
    assert check.undeclared_keys(values, stages) == ["quant.group_size: no stage declares it"]
    stages["scales"]["params"] = ["quant", "run.x"]
    assert check.undeclared_keys(values, stages) == ["run.x: declared"]


@pytest.mark.parametrize("dep", ["data/tokens", "data/tokens/test", "data/tokens/test/x", "data"])
def test_leaks_of_test_text_are_found(dep: str) -> None:
    split = "data/tokens/test"
    assert check.leaks_of_test_text({"cache": {"deps": ["lib/base", dep]}}, split)
    assert not check.leaks_of_test_text({"evaluate": {"deps": [dep]}}, split)
    assert not check.leaks_of_test_text({"cache": {"deps": ["data/tokens/val"]}}, split)


@pytest.mark.parametrize(
    "block",
    [
        "lib/        the library\n  base/     files\n  api.py\nparams.yaml  values\n",
        "├── lib/     the library\n│   ├── base/\n│   └── api.py\n└── params.yaml\n",
    ],
)
def test_readme_tree_is_compared_both_ways(tmp_path: Path, block: str) -> None:
    listed = check.readme_tree(f"# X\n\n## File tree\n\nWords.\n\n```text\n{block}```\n")
    assert listed == {"lib", "lib/base", "lib/api.py", "params.yaml"}
    write(tmp_path, {"lib/base/a.py": "", "lib/api.py": "", "params.yaml": "", ".git/x": ""})
    assert check.tree_violations(tmp_path, listed) == []
    write(tmp_path, {"lib/new/a.py": "", "more.txt": ""})
    (tmp_path / "params.yaml").unlink()
    assert check.tree_violations(tmp_path, listed) == [
        "params.yaml: listed, does not exist",
        "more.txt: not listed",
        "lib/new: not listed",
    ]
    with pytest.raises(ValueError, match="File tree"):
        check.readme_tree("# X\n")
