"""The house: who may import whom, what is documented, what an import costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ties_peft

ROOT = Path(ties_peft.__file__).parent

# A module imports only from lower floors. Rooms that are folders count as one module; their own files
# import nothing of the folder but its `base`, and its `__init__` finds them.
FLOORS = {
    "aliases": 0,
    "choices": 0,
    "delta": 0,
    "draws": 0,
    "errors": 0,
    "fast": 0,
    "lanes": 0,
    "patterns": 0,
    "spellings": 0,
    "threshold": 0,
    "triton_loops": 0,
    "document": 1,
    "elect": 1,
    "factorise": 1,
    "fused": 1,
    "loops": 1,
    "missing": 1,
    "processes": 1,
    "report": 1,
    "rows": 1,
    "schedule": 1,
    "sources": 1,
    "state": 1,
    "store": 1,
    "targets": 1,
    "tensors": 1,
    "tiles": 1,
    "trim": 1,
    "writer": 1,
    "base_model": 2,
    "basis": 2,
    "companions": 2,
    "foreign": 2,
    "loading": 2,
    "scale": 2,
    "single_pass": 2,
    "sparsify": 2,
    "spectrum": 2,
    "statistics": 2,
    "task": 2,
    "card": 3,
    "kinds": 3,
    "spaces": 3,
    "steps": 3,
    "collection": 4,
    "riders": 4,
    "adapter": 5,
    "layers": 5,
    "methods": 5,
    "order_statistics": 5,
    "loaded": 6,
    "mergekit": 6,
    "push": 6,
    "settings": 6,
    "strangers": 6,
    "translate": 6,
    "values": 6,
    "whole": 6,
    "bench": 7,
    "heads": 7,
    "recipe": 7,
    "exam": 8,
    "flags": 8,
    "members": 8,
    "merged": 8,
    "ranks": 8,
    "student": 8,
    "tuning": 8,
    "controls": 9,
    "distilled": 9,
    "language": 9,
    "lessons": 9,
    "plan": 9,
    "sampling": 9,
    "training": 9,
    "coordinates": 10,
    "evaluate": 10,
    "fitting": 10,
    "inspection": 10,
    "study": 10,
    "gather": 11,
    "harness": 11,
    "judges": 11,
    "survey": 11,
    "teachers": 11,
    "account": 12,
    "merge": 13,
    "convert": 14,
    "live": 14,
    "prepare": 14,
    "signs": 14,
    "start": 14,
    "distil": 15,
    "hunt": 15,
    "search": 16,
    "__init__": 17,
    "cli": 17,
    "__main__": 18,
}
FOLDERS = ("cli", "kinds", "methods", "spaces")
HEAVY = ("transformers", "peft", "accelerate")
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """What of ties_peft a file imports, lazily too: (module,) or (folder, file)."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "ties_peft")
        elif isinstance(node, ast.ImportFrom):
            yield from _from(node, package)


def _from(node: ast.ImportFrom, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    parts = tuple((node.module or "").split(".")) if node.module else ()
    if node.level:
        parts = package[: len(package) - node.level + 1] + parts
    elif parts[0] == "ties_peft":
        parts = parts[1:]
    else:
        return
    for alias in node.names:
        whole = (*parts, alias.name)
        yield whole if _is_module(whole) else parts or ("__init__",)


def _is_module(parts: tuple[str, ...]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or path.is_dir()


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_module_has_a_floor() -> None:
    assert sorted({room(path) for path in files()}) == sorted(FLOORS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_lower_floors(path: Path) -> None:
    own = room(path)
    for parts in imported(path):
        other = parts[0] if parts else "__init__"
        if other == own or (other == "__init__" and own in ("cli", "__main__")):
            continue  # the command line tells the version, which stands in __init__
        assert FLOORS[other] < FLOORS[own], f"{own} imports {other}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_a_folder_do_not_know_each_other(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        inside = {parts[1] for parts in imported(path) if parts[:1] == (folder,) and len(parts) > 1}
        assert inside <= {"base"}, f"{path.name} imports {inside}"


def test_kinds_methods_and_spaces_do_not_know_each_other() -> None:
    rooms = set(FOLDERS) - {"cli"}
    for folder in rooms:
        for path in (ROOT / folder).glob("*.py"):
            assert not {parts[0] for parts in imported(path) if parts} & (rooms - {folder})


def test_nothing_imports_the_heavy_packages_when_it_is_read() -> None:
    for path in files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & set(HEAVY), path.name


def test_a_merge_imports_no_heavy_package(make_lora: Callable[..., Path], make_ia3: Callable[..., Path]) -> None:
    """In a process of its own: by Python, by the command line, LoRA and (IA)³, saving included."""
    code = f"""
import sys
import ties_peft
assert not set({(*HEAVY, "huggingface_hub", "typer")!r}) & set(sys.modules), "import"
ties_peft.merge([{str(make_lora("a"))!r}, {str(make_lora("b", seed=1))!r}]).save({str(make_lora("a").parent / "out")!r})
from ties_peft import cli
sys.argv = ["ties-peft", "merge", {str(make_ia3("c"))!r}, "--density", "1", "--out", {str(make_lora("a").parent / "out2")!r}, "--json"]
cli.main()
"""
    check = f"import atexit, sys\natexit.register(lambda: print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))"
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_all_is_sorted_and_each_name_is_there() -> None:
    assert list(ties_peft.__all__) == sorted(ties_peft.__all__)
    assert len(set(ties_peft.__all__)) == len(ties_peft.__all__)
    for name in ties_peft.__all__:
        assert hasattr(ties_peft, name)


def public(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public classes and functions of a file, and public methods of its public classes."""
    for node in getattr(tree, "body", []):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module"
    bare = [name for name, node in public(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not bare


def test_every_argument_of_the_public_functions_is_explained() -> None:
    for function in (ties_peft.merge, ties_peft.Adapter.load, ties_peft.Adapter.save, ties_peft.Merged.save):
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            assert name in ("self", "cls") or name in text, f"{function.__qualname__}: {name}"


def _length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    text = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (text.count("\n") + 1 if text else 0)


def test_files_and_functions_are_short() -> None:
    long = []
    for path in files():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONGEST_FILE:
            long.append(path.name)
        long += [
            f"{path.name}: {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and _length(node) > LONGEST_FUNCTION
        ]
    assert not long
