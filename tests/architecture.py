"""Checks of the code's structure, as functions of a root folder so that they can be tested.

Each returns the violations it found, one line each; an empty list means that the rule holds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec
from ruamel.yaml import YAML

LAYERS: dict[str, int] = {
    "lib.base": 0,
    "lib.quant": 1,
    "lib.distill": 1,
    "lib.params": 2,
    "lib.cache": 2,
    "lib.text": 2,
    "lib.model": 2,
    "lib.objective": 3,
    "lib.capture": 4,
    "lib.sensitivity": 4,
    "lib.start": 4,
    "lib.train": 4,
    "lib.convert": 4,
    "lib.snap": 4,
    "lib.ane": 4,
    "lib.evaluate": 4,
    "lib.export": 4,
    "lib.report": 4,
    "lib.recover": 5,
    "lib.cli": 6,
    "lib.interface": 5,
    "lib.api": 6,
}
"""Package -> layer. A module imports from its own package and from smaller layers only."""
FACES = 6

MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 79
MAX_STAGE_LINES = 60
SHARED_SECTIONS = ("distill", "layerwise", "blockwise", "prox", "run")
MAY_SEE_TEST_TEXT = ("tokens", "evaluate", "ane_check")
UNLISTED = ("__pycache__", "runs", "wandb", "dvc_plots", "dvc.lock")
"""Top-level names that the README's tree may leave out: they appear when things run."""


def unit_of(module: str) -> str:
    """What a module belongs to: its package, or itself among stages (which share nothing)."""
    parts = module.split(".")
    return ".".join(parts[:2])


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for lib and stages; a package's name stands for its __init__."""
    modules = {}
    for top in ("lib", "stages"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _named_in(node: ast.AST, module: str, is_package: bool) -> Iterable[str]:
    """Dotted names that one node imports, candidates for modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = module.split(".")[: None if is_package else -1]
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        name = called.id if isinstance(called, ast.Name) else called
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere in its text, lazily or not."""
    modules = find_modules(root)
    graph = {}
    for module, path in modules.items():
        is_package = path.name == "__init__.py"
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in _named_in(node, module, is_package)
        }
        graph[module] = {name for name in names if name in modules and name != module}
    return graph


def layer_violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go down or sideways, and packages that have no layer."""
    found = []
    for module, imported in sorted(graph.items()):
        if module in ("lib", "stages"):
            continue
        unit = unit_of(module)
        layer = FACES if unit.startswith("stages.") else LAYERS.get(unit)
        if layer is None:
            found.append(f"{module}: {unit} has no layer")
            continue
        for other in sorted(imported):
            target = unit_of(other)
            if other in ("lib", "stages") or target == unit:
                continue
            if target.startswith("stages.") or LAYERS.get(target, FACES) >= layer:
                found.append(f"{module} imports {other}")
    return found


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Import cycles, each once, as `a -> b -> a`."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            loop = [*trail[trail.index(module) :], module]
            found.append(" -> ".join(loop))
            return
        if module in done:
            return
        for other in sorted(graph.get(module, ())):
            visit(other, [*trail, module])
        done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def filled_inits(root: Path) -> list[str]:
    """__init__ files that are not empty: every import cycle would run through one."""
    return [
        str(path.relative_to(root))
        for top in ("lib", "stages", "tests")
        for path in sorted((root / top).rglob("__init__.py"))
        if path.stat().st_size
    ]


def size_violations(root: Path) -> list[str]:
    """Files, functions and stages that are too long."""
    found = []
    for top in ("lib", "stages", "tests"):
        for path in sorted((root / top).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name, lines = path.relative_to(root), len(text.splitlines())
            limit = MAX_STAGE_LINES if top == "stages" else MAX_FILE_LINES
            if lines > limit:
                found.append(f"{name}: {lines} lines, at most {limit}")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    if length > MAX_FUNCTION_LINES:
                        found.append(f"{name}: {node.name} has {length} lines")
    return found


def load_yaml(path: Path) -> Any:
    """Plain values of a YAML file."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def paths_of(entries: Iterable[Any] | None) -> list[str]:
    """Paths of a list of deps or outs, where an entry may carry options."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries or ()]


def outputs_of(stage: dict[str, Any]) -> list[str]:
    """Everything a stage writes: outs, metrics and plots."""
    return [path for kind in ("outs", "metrics", "plots") for path in paths_of(stage.get(kind))]


def is_under(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or lies in it."""
    return Path(path).is_relative_to(folder)


def closure(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that importing ``start`` may import, itself included."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += graph.get(module, ())
    return seen


def dependency_violations(root: Path, stages: dict[str, Any]) -> list[str]:
    """Code that a stage imports without depending on it, and code deps that it does not import."""
    modules, graph = find_modules(root), import_graph(root)
    found = []
    for name, stage in stages.items():
        files = {
            modules[module].relative_to(root).as_posix()
            for module in closure(graph, f"stages.{name}")
            if module in modules and modules[module].name != "__init__.py"
        }
        code = [dep for dep in paths_of(stage["deps"]) if dep.split("/")[0] in ("lib", "stages")]
        found += [
            f"{name}: imports {file}, which its deps do not cover"
            for file in sorted(files)
            if not any(is_under(file, dep) for dep in code)
        ]
        found += [
            f"{name}: depends on {dep} but imports nothing of it"
            for dep in code
            if not any(is_under(file, dep) for file in files)
        ]
    return found


def naming_violations(root: Path, stages: dict[str, Any], sections: Iterable[str]) -> list[str]:
    """Stage = stages/<word>.py = section = output folder, both ways."""
    found = []
    files = {path.stem for path in (root / "stages").glob("*.py")} - {"__init__"}
    for name in sorted(files.symmetric_difference(stages)):
        found.append(f"{name}: stages/{name}.py and stages.{name} in dvc.yaml must both exist")
    for name in sorted((set(sections) - set(SHARED_SECTIONS)).symmetric_difference(stages)):
        found.append(f"{name}: the section and stages.{name} in dvc.yaml must both exist")
    for name, stage in stages.items():
        if not stage["cmd"].startswith(f"python -m stages.{name} "):
            found.append(f"{name}: its command is {stage['cmd']!r}")
        for path in outputs_of(stage):
            if not (is_under(path, f"data/{name}") or is_under(path, f"runs/{name}")):
                found.append(f"{name}: writes {path}, outside its folder")
    return found


def overlapping_outputs(stages: dict[str, Any]) -> list[str]:
    """Outputs that are the same, or lie inside one another."""
    everything = [(name, path) for name, stage in stages.items() for path in outputs_of(stage)]
    return [
        f"{path} of {name} lies in {other_path} of {other}"
        for index, (name, path) in enumerate(everything)
        for other_index, (other, other_path) in enumerate(everything)
        if index != other_index and is_under(path, other_path)
    ]


def misplaced_outputs(ignored: Iterable[str], stages: dict[str, Any]) -> list[str]:
    """Outputs that neither git nor DVC keeps, or both do; ``ignored`` are lines of .gitignore."""
    spec, found = GitIgnoreSpec.from_lines(ignored), []
    for stage in stages.values():
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, ())]
        for entry in entries:
            path, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            by_dvc, by_git = options.get("cache", True), not spec.match_file(path)
            if by_dvc is by_git:
                found.append(f"{path}: kept {'twice' if by_git else 'nowhere'}")
    return found


def undeclared_keys(values: dict[str, Any], stages: dict[str, Any]) -> list[str]:
    """Keys of params.yaml that no stage declares (except run), and stages that declare run."""
    declared = {key for stage in stages.values() for key in stage.get("params", [])}

    def leaves(node: Any, prefix: str) -> Iterable[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(value, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix

    found = [
        f"{leaf}: no stage declares it"
        for leaf in leaves(values, "")
        if not leaf.startswith("run.")
        and not any(leaf == key or leaf.startswith(f"{key}.") for key in declared)
    ]
    return found + [f"{key}: declared" for key in sorted(declared) if key.split(".")[0] == "run"]


def leaks_of_test_text(stages: dict[str, Any], test_split: str) -> list[str]:
    """Stages that could read the test split and must not."""
    return [
        f"{name}: depends on {dep}"
        for name, stage in stages.items()
        if name not in MAY_SEE_TEST_TEXT
        for dep in paths_of(stage["deps"])
        if is_under(dep, test_split) or is_under(test_split, dep)
    ]


def readme_tree(text: str) -> set[str]:
    """Paths in the ```text block under the heading "File tree"; folders without their slash.

    A line is an indented name (with or without branch glyphs) and a remark behind it.

    Raises:
        ValueError: there is no such heading or block.
    """
    block = re.search(r"^#+ File tree\s*$.*?^```text\n(.*?)^```", text, re.M | re.S)
    if block is None:
        raise ValueError("README.md has no ```text block under a heading 'File tree'")
    found: set[str] = set()
    above: list[tuple[int, str]] = []  # column and name of each open folder
    for line in block[1].splitlines():
        entry = re.match(r"^([\s│├└─|`]*)(\S+)", line)
        if entry is None:
            continue
        column, name = len(entry[1]), entry[2].rstrip("/")
        while above and above[-1][0] >= column:
            above.pop()
        above.append((column, name))
        found.add("/".join(part for _, part in above))
    return found


def tree_violations(root: Path, listed: set[str]) -> list[str]:
    """Differences between the README's tree and the tree: top level and lib must be complete."""
    found = [
        f"{path}: listed, does not exist"
        for path in sorted(listed)
        if not (root / path).exists() and path.split("/")[0] not in UNLISTED
    ]
    for folder in ("", "lib"):
        for path in sorted((root / folder).iterdir()):
            name = path.relative_to(root).as_posix()
            hidden = path.name.startswith((".", "__")) or path.suffix == ".egg-info"
            if not hidden and name not in UNLISTED and name not in listed:
                found.append(f"{name}: not listed")
    return found
