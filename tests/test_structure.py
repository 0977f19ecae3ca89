"""The structure of the package: who may import whom, what is documented, what an import costs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ties_peft

ROOT = Path(ties_peft.__file__).parent

# The packages and modules of `ties_peft/`, the lowest first. Each imports only what stands before it.
ORDER = (
    "errors",
    "task_vectors",
    "adapters",
    "spaces",
    "methods",
    "merging",
    "analysis",
    "evaluation",
    "learning",
    "search",
    "cli",
    "__init__",
    "__main__",
)
# Their files do not know each other: each is found by the package and imports only its `base` and `aliases`.
FOUND = ("spaces", "methods", "cli")
HEAVY = ("transformers", "peft", "accelerate")
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


FLAG = re.compile(r"(?<![\w-])--[a-z]")
IN_PYTHON = re.compile(r"\w=|ties-peft |\w+ \(--")  # how the same is asked for in Python, or a whole command
OF_COMMANDS = ("cli", "overrides.py")  # what only the command line calls


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """What of ties_peft a file imports, lazily too, as the parts of a module's path."""
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


def first(path: Path) -> str:
    """The package or module of `ties_peft/` that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def test_every_package_has_a_place_in_the_order() -> None:
    assert sorted({first(path) for path in files()}) == sorted(ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_lower_packages(path: Path) -> None:
    own = first(path)
    for parts in imported(path):
        other = parts[0] if parts else "__init__"
        if other == own or (other == "__init__" and own in ("cli", "__main__")):
            continue  # the command line tells the version, which stands in __init__
        assert ORDER.index(other) < ORDER.index(own), f"{own} imports {other}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    known = {name_of(path): path for path in files()}
    waits = {
        name: {parts for parts in imported(path) if parts in known and parts != name} for name, path in known.items()
    }
    done: set[tuple[str, ...]] = set()
    while ready := {name for name, others in waits.items() if name not in done and others <= done}:
        done |= ready
    assert not sorted(set(waits) - done)


@pytest.mark.parametrize("folder", [*FOUND, "adapters/types", "adapters/formats"])
def test_files_of_a_folder_do_not_know_each_other(folder: str) -> None:
    """Except for the one that chooses among the others."""
    own = tuple(folder.split("/"))
    for path in sorted(path for path in (ROOT / folder).glob("*.py") if path.name != "auto.py"):
        inside = {parts[len(own)] for parts in imported(path) if parts[: len(own)] == own and len(parts) > len(own)}
        assert inside <= {"base", "aliases"}, f"{path.name} imports {inside}"


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


def test_a_merge_imports_only_what_it_uses(make_lora: Callable[..., Path]) -> None:
    """By the command line, in a process of its own: no other method or space, no page, no recipe of another program."""
    code = f"""
import atexit, sys
atexit.register(lambda: print(*(name for name in sys.modules if name.startswith("ties_peft.")), file=sys.stderr))
from ties_peft import cli
sys.argv = ["ties-peft", "merge", {str(make_lora("a"))!r}, "--method", "sce", "--out", {str(make_lora("a").parent / "out")!r}, "--json"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    used = set(done.stderr.splitlines()[-1].split())
    assert done.returncode == 0 and {"ties_peft.methods.sce", "ties_peft.spaces.delta"} <= used
    unused = (
        "methods.ties",
        "methods.dual",
        "spaces.knots",
        "analysis",
        "merging.recipes.mergekit",
        "merging.pipeline",
        "adapters.to_peft",
    )
    assert not used & {f"ties_peft.{name}" for name in unused}


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


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts in a piece of code, with braces for values."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def test_an_error_that_python_users_see_too_names_more_than_a_flag() -> None:
    """Such as "--force (force=True)"."""
    raised = [
        (path.name, text)
        for path in files()
        if not {*path.relative_to(ROOT).parts} & {*OF_COMMANDS}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        for text in texts(node)
    ]
    flagged = [(name, text) for name, text in raised if FLAG.search(text)]
    assert len(flagged) > 20
    assert [(name, text) for name, text in flagged if not IN_PYTHON.search(text)] == []
