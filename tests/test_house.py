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
    "errors": 0,
    "choices": 0,
    "delta": 0,
    "tiles": 1,
    "trim": 0,
    "elect": 1,
    "fast": 0,
    "lanes": 0,
    "loops": 1,
    "triton_loops": 0,
    "fused": 1,
    "draws": 0,
    "spellings": 0,
    "patterns": 0,
    "threshold": 0,
    "tensors": 1,
    "factorise": 1,
    "sources": 1,
    "statistics": 2,
    "base_model": 2,
    "foreign": 2,
    "companions": 2,
    "targets": 2,
    "loading": 2,
    "writer": 1,
    "processes": 1,
    "schedule": 1,
    "scale": 2,
    "document": 1,
    "report": 1,
    "sparsify": 1,
    "spectrum": 2,
    "basis": 2,
    "card": 3,
    "kinds": 3,
    "methods": 3,
    "order_statistics": 4,
    "riders": 4,
    "adapter": 5,
    "layers": 5,
    "whole": 5,
    "heads": 6,
    "spaces": 3,
    "settings": 4,
    "mergekit": 4,
    "translate": 6,
    "loaded": 6,
    "recipe": 5,
    "members": 6,
    "values": 6,
    "ranks": 6,
    "flags": 6,
    "merged": 6,
    "plan": 7,
    "coordinates": 8,
    "strangers": 6,
    "inspection": 8,
    "glance": 8,
    "survey": 9,
    "account": 10,
    "merge": 11,
    "prepare": 12,
    "convert": 12,
    "push": 12,
    "live": 12,
    "rows": 2,
    "task": 3,
    "bench": 12,
    "missing": 1,
    "exam": 13,
    "language": 14,
    "evaluate": 15,
    "harness": 16,
    "gather": 16,
    "tuning": 6,
    "sampling": 7,
    "store": 1,
    "study": 8,
    "hunt": 13,
    "judges": 17,
    "controls": 16,
    "training": 14,
    "signs": 16,
    "search": 18,
    "student": 13,
    "lessons": 14,
    "state": 1,
    "fitting": 15,
    "teachers": 16,
    "start": 14,
    "distilled": 7,
    "distil": 17,
    "__init__": 20,
    "cli": 20,
    "__main__": 21,
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
