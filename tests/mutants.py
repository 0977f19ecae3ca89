"""Measure what the tests detect: change one line of the package at random, and run the tests that execute it.

    python tests/mutants.py record coverage.json            # records which test executes which line; needs `coverage`
    python tests/mutants.py run coverage.json table.json    # draws mutants and runs their tests; --seed, --number, --missed

A mutant is the package with one line changed. The line is drawn uniformly from all lines of `ties_peft` to which one of
the changes below applies, then one change of it: another operator or comparison, another number or truth value, a negated
condition, a removed statement. The tests that execute the line run in a copy of the repository until one fails; quick
tests come first, and of each test function one case before the others. Coverage does not see compiled loops and other
processes; for such lines the tests of the rest of the function run, then those of the file, then those of the folder.
Mutants that change no result count as not detected.

All tests are collected once. For each mutant this process forks, and the child replaces the code of the changed function.
Code that is executed when a module is imported, and compiled code, needs a new process instead.
"""

from __future__ import annotations

import argparse
import ast
import gc
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest import main

ROOT = Path(__file__).parent.parent
PACKAGE = "ties_peft"
QUIET = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
OPERATORS = {
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
    "//": "/",
    "%": "*",
    "**": "*",
    "@": "*",
    "|": "&",
    "&": "|",
    "<<": ">>",
    ">>": "<<",
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
    "and": "or",
    "or": "and",
}
OPERATOR = re.compile(r"\*\*|//|<<|>>|[<>=!]=|not\s+in|is\s+not|\b(?:in|is|and|or)\b|[-+*/%@|&<>]")
Coverage = Mapping[str, Mapping[int, Collection[str]]]  # file → line → tests


@dataclass(frozen=True)
class Mutant:
    """A line of a file, and the line in its place."""

    file: str
    line: int
    before: str
    after: str


# -- The changes


def changes(source: str) -> dict[int, list[str]]:
    """Return the lines that may replace each line of a source, by the number of the line."""
    lines = source.splitlines()
    found: dict[int, list[str]] = defaultdict(list)
    for statement in ast.parse(source).body:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        for node in _code(statement):
            for number, start, end, text in _edits(node, lines):
                line = lines[number - 1].encode()
                changed = (line[:start] + text.encode() + line[end:]).decode()
                whole = [*lines[first - 1 : number - 1], changed, *lines[number : statement.end_lineno]]
                if changed not in found[number] and _compiles("\n".join(whole)):
                    found[number].append(changed)
    return {number: texts for number, texts in found.items() if texts}


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without annotations, f-strings, imports and blocks for type checkers."""
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


def _edits(node: ast.AST, lines: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    """Yield the edits of a node: line, first byte, end, new text."""
    if isinstance(node, ast.BinOp):
        yield from _operator(node.left, node.right, lines)
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:]):  # noqa: B905
            yield from _operator(left, right, lines)
    elif isinstance(node, ast.Compare):
        for left, right in zip([node.left, *node.comparators], node.comparators):  # noqa: B905
            yield from _operator(left, right, lines)
    elif isinstance(node, ast.Constant):
        yield from _constant(node)
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield from _negated(node.test, lines)
    elif isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield from _negated(test, lines)
    elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Return)):
        yield from _dropped(node)


def _span(node: Any) -> tuple[int, int, int] | None:
    """Return the line, the first byte and the end of a node; None if it has several lines."""
    return (node.lineno, node.col_offset, node.end_col_offset) if node.lineno == node.end_lineno else None


def _operator(left: Any, right: Any, lines: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    if left.end_lineno != right.lineno:
        return
    gap = lines[right.lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
    match = OPERATOR.search(gap)
    if match:
        start = left.end_col_offset + len(gap[: match.start()].encode())
        new = OPERATORS[re.sub(r"\s+", " ", match.group())]
        yield right.lineno, start, start + len(match.group()), new


def _constant(node: ast.Constant) -> Iterator[tuple[int, int, int, str]]:
    span = _span(node)
    if span is None or not isinstance(node.value, (bool, int, float)):
        return
    if isinstance(node.value, bool):
        yield (*span, repr(not node.value))
    else:
        yield (*span, repr(node.value + 1 if isinstance(node.value, int) else 2 * node.value or 1.0))


def _negated(test: Any, lines: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    span = _span(test)
    if span:
        text = lines[span[0] - 1].encode()[span[1] : span[2]].decode()
        yield (*span, f"(not ({text}))")


def _dropped(node: Any) -> Iterator[tuple[int, int, int, str]]:
    span = _span(node)
    if span is None or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)):
        return
    if isinstance(node, ast.Return):
        if node.value is not None:
            yield (*span, "return None")
    else:
        yield (*span, "pass")


def draw(root: Path, number: int, seed: int) -> list[Mutant]:
    """Draw lines uniformly from the package, and one change of each."""
    candidates = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for line, texts in sorted(changes(source).items()):
            candidates.append((str(path.relative_to(root)), line, source.splitlines()[line - 1], texts))
    chance = random.Random(seed)
    return [
        Mutant(file, line, before, chance.choice(texts))
        for file, line, before, texts in chance.sample(candidates, number)
    ]


# -- Which test executes which line


class Recorder:
    """A pytest plugin that records the lines that each test executes, and the seconds that it takes."""

    def __init__(self) -> None:
        import coverage

        self.file = tempfile.NamedTemporaryFile(suffix=".coverage", delete=False).name  # noqa: SIM115
        self.coverage = coverage.Coverage(data_file=self.file, source=[PACKAGE], config_file=False)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_sessionstart(self) -> None:
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome == "failed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()

    def result(self) -> dict[str, Any]:
        return {
            "seconds": dict(self.seconds),
            "failed": sorted(self.failed),
            "lines": executed(self.file, [test for test in self.seconds if test not in self.failed]),
        }


def executed(data_file: str, tests: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Return the numbers of the tests that execute a line, by file and line."""
    import coverage

    number = {test: n for n, test in enumerate(tests)}
    data = coverage.CoverageData(data_file)
    data.read()
    lines = {}
    for file in data.measured_files():
        contexts = data.contexts_by_lineno(file)
        name = f"{PACKAGE}/" + file.rpartition(f"/{PACKAGE}/")[2]
        lines[name] = {str(line): sorted(number[t] for t in tests if t in number) for line, tests in contexts.items()}
    return lines


def record(out: Path, arguments: Sequence[str]) -> None:
    """Run the tests, and write what a `Recorder` found."""
    recorder = Recorder()
    pytest.main([*QUIET, *arguments], plugins=[recorder])
    out.write_text(json.dumps(recorder.result()), encoding="utf-8")


# -- The tests of a line


class Tests:
    """The tests of each line and their seconds, as `record` wrote them."""

    def __init__(self, recorded: Mapping[str, Any]) -> None:
        self.seconds: Mapping[str, float] = recorded["seconds"]
        names = [test for test in self.seconds if test not in set(recorded["failed"])]
        self.lines: Coverage = {
            file: {int(line): [names[n] for n in tests] for line, tests in lines.items()}
            for file, lines in recorded["lines"].items()
        }

    def of(self, mutant: Mutant, source: str, known: Collection[str], limit: float) -> list[str]:
        """Return the known tests of a mutant's line, then of its function, file and folder, up to `limit` seconds."""
        lines = self.lines.get(mutant.file, {})
        groups = [] if at_import(source, mutant.line) else [lines.get(mutant.line, [])]
        groups += [[t for n in function(source, mutant.line) for t in lines.get(n, [])]]
        if not any(groups):  # the code is compiled, or runs in another process
            groups += [[t for t in known if Path(mutant.file).parent.name in text_of(t.partition("::")[0])]]
        groups += [[t for tests in lines.values() for t in tests]]
        folder = str(Path(mutant.file).parent)
        beside = [n for file, n in self.lines.items() if str(Path(file).parent) == folder]
        groups += [[t for lines in beside for tests in lines.values() for t in tests]]
        chosen: dict[str, float] = {}
        for group in groups:
            for test in self.by_function(set(self.variants(group, known)) - set(chosen)):
                if chosen and sum(chosen.values()) + self.time(test) > limit:
                    break
                chosen[test] = self.time(test)
        return list(chosen)

    def variants(self, tests: Iterable[str], known: Collection[str]) -> list[str]:
        """Return the known tests among some, and those of the same test functions that were not recorded."""
        functions = {test.partition("[")[0] for test in tests}
        new = [test for test in known if test not in self.seconds and test.partition("[")[0] in functions]
        return [*(set(tests) & set(known)), *new]

    def time(self, test: str) -> float:
        return self.seconds.get(test, 1.0)

    def by_function(self, tests: Collection[str]) -> list[str]:
        """Order tests by duration: first one of every test function, then a second one of each, and so on."""
        seen: Counter[str] = Counter()
        rounds = []
        for test in sorted(tests, key=lambda test: (self.time(test), test)):
            name = test.partition("[")[0]
            rounds.append((seen[name], self.time(test), test))
            seen[name] += 1
        return [test for *_, test in sorted(rounds)]


@cache
def text_of(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


def function(source: str, line: int) -> range:
    """Return the lines of the body of the innermost function around a line."""
    inside = range(0)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
            if line in body and (not inside or len(body) < len(inside)):
                inside = body
    return inside


def at_import(source: str, line: int) -> bool:
    """Return whether a line is executed when its module is imported, so that coverage assigns it to the first test."""
    return not function(source, line)


# -- One mutant


class Select:
    """A pytest plugin that runs some tests in the given order, and stores the first that fails."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.order = {test: n for n, test in enumerate(tests)}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "failed":
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self.failed = self.failed or f"{report.nodeid} (import)"


def run_in_new_process(answer: Path) -> None:
    """Run the tests that a file names, and write the name of the one that fails into the file."""
    tests = json.loads(answer.read_text(encoding="utf-8"))
    select = Select(tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = pytest.main([*QUIET, "-x", *files], plugins=[select])
    stopped = "" if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else f"(pytest: {code})"
    answer.write_text(json.dumps(select.failed or stopped), encoding="utf-8")


def run_in_fork(session: pytest.Session, tests: Sequence[str], answer: Path, changed: CodeType, line: int) -> None:
    """Replace the code of the changed function, run the tests, write the one that fails, and end the process."""
    replaced = replace(changed, line)
    select = Select(tests)
    if replaced:
        select.pytest_collection_modifyitems(session.items)
        session.config.pluginmanager.register(select)
        session.config.option.maxfail = 1
        with suppress(BaseException):
            main.pytest_runtestloop(session)
    answer.write_text(json.dumps(select.failed if replaced else None), encoding="utf-8")
    os._exit(0)


def replace(module: CodeType, line: int) -> bool:
    """Give the function that contains a line its code from `module`, and clear all caches; return whether it exists."""
    changed = {(c.co_name, c.co_firstlineno): c for c in functions(module) if line in all_lines(c)}
    known = gc.get_objects()
    mine = [f for f in known if isinstance(f, FunctionType) and f.__code__.co_filename == module.co_filename]
    mine = [f for f in mine if (f.__code__.co_name, f.__code__.co_firstlineno) in changed]
    for f in mine:
        try:
            f.__code__ = changed[f.__code__.co_name, f.__code__.co_firstlineno]
        except ValueError:  # the new code has other variables of an enclosing function
            return False
    for cached in known:
        if hasattr(type(cached), "cache_clear") and getattr(cached, "__module__", "").startswith(PACKAGE):
            cached.cache_clear()
    return bool(mine)


def functions(code: CodeType) -> Iterator[CodeType]:
    """Yield the outermost functions of a module and of its classes."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from [inner] if inner.co_flags & inspect.CO_OPTIMIZED else functions(inner)


def all_lines(code: CodeType) -> set[int]:
    """Return the lines of a function and of the functions in it."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return {line for *_, line in code.co_lines() if line} | {line for c in inner for line in all_lines(c)}


class Run:
    """A pytest plugin that runs mutants in place of tests."""

    def __init__(self, tests: Tests, mutants: Sequence[Mutant], out: Path, limit: float) -> None:
        self.tests, self.mutants, self.out, self.limit = tests, mutants, out, limit
        self.answer = Path.cwd() / "answer.json"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        known = {item.nodeid for item in session.items}
        rows = json.loads(self.out.read_text(encoding="utf-8")) if self.out.exists() else []
        for mutant in self.mutants:
            begun = time.monotonic()
            source = Path(mutant.file).read_text(encoding="utf-8")
            chosen = self.tests.of(mutant, source, known, self.limit)
            found = self.detect(session, mutant, source, chosen)
            rows = [row for row in rows if {**row, **asdict(mutant)} != row]
            rows.append({**asdict(mutant), "tests": len(chosen), "detected": found})
            self.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            took = time.monotonic() - begun
            print(
                f"{took:5.0f} s  {mutant.file}:{mutant.line}  {found or 'NOT DETECTED'}",
                file=sys.__stderr__,
                flush=True,
            )
        print(summary(rows), file=sys.__stderr__)
        return True

    def detect(self, session: pytest.Session, mutant: Mutant, source: str, tests: Sequence[str]) -> str:
        """Return the test that fails on the mutant; empty if none does."""
        path, lines = Path(mutant.file), source.splitlines(keepends=True)
        lines[mutant.line - 1] = lines[mutant.line - 1].replace(mutant.before, mutant.after)
        path.write_text("".join(lines), encoding="utf-8")
        seconds = 120 + 10 * sum(map(self.tests.time, tests))
        try:
            if not at_import(source, mutant.line) and "kernels" not in mutant.file:
                code = compile("".join(lines), str(path.absolute()), "exec")
                found = self.detect_in_fork(session, tests, code, mutant.line, seconds)
                if found is not None:
                    return found
            return self.detect_in_new_processes(tests, seconds)
        finally:
            path.write_text(source, encoding="utf-8")

    def detect_in_fork(
        self, session: pytest.Session, tests: Sequence[str], code: CodeType, line: int, seconds: float
    ) -> str | None:
        """Run the tests in a fork of this process; None if the code of the function cannot be replaced."""
        self.answer.write_text('"(the process ended)"', encoding="utf-8")
        child = os.fork()
        if child == 0:
            os.setpgrp()
            run_in_fork(session, tests, self.answer, code, line)
        end = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "(time)"
            time.sleep(0.02)
        return json.loads(self.answer.read_text(encoding="utf-8"))

    def detect_in_new_processes(self, tests: Sequence[str], seconds: float) -> str:
        """Run a few of the tests in a new process, then the others in a second one."""
        for part in (tests[:40], tests[40:]):
            if not part:
                break
            self.answer.write_text(json.dumps(part), encoding="utf-8")
            command = [sys.executable, "tests/mutants.py", "tests", str(self.answer)]
            caches = {"NUMBA_CACHE_DIR": tempfile.mkdtemp(dir=Path.cwd())}
            child = subprocess.Popen(
                command, env={**os.environ, **caches}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                child.wait(seconds + 60)
            except subprocess.TimeoutExpired:
                child.kill()
                return "(time)"
            found = json.loads(self.answer.read_text(encoding="utf-8"))
            if isinstance(found, list):
                return "(the process ended)"
            if found:
                return found
        return ""


def run(recorded: Path, out: Path, mutants: Sequence[Mutant], limit: float, arguments: Sequence[str]) -> None:
    """Run the tests of some mutants in a copy of the repository, and write the table."""
    recorded, out = recorded.absolute(), out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        for name in subprocess.check_output(
            ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, text=True
        ).split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[0] = str(copy)  # in place of the folder of this file, which has a conftest
        for path in sorted(set(Path(PACKAGE).rglob("*.py")) - {Path(PACKAGE) / "__main__.py"}):
            with suppress(ImportError):
                import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        tests = Tests(json.loads(recorded.read_text(encoding="utf-8")))
        pytest.main([*QUIET, *arguments], plugins=[Run(tests, mutants, out, limit)])


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the mutants detected by package."""
    count: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        count[row["file"].split("/")[1].removesuffix(".py")].append(bool(row["detected"]))
    count["all"] = [one for seen in count.values() for one in seen]
    lines = [f"| {name} | {len(seen)} | {sum(seen)} |" for name, seen in count.items()]
    return "\n".join(["| package | mutants | detected |", "|---|---|---|", *lines])


def command_line() -> None:
    """Parse the command line, and record or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record which test executes which line")
    recording.add_argument("out", type=Path, help="file of the record")
    recording.add_argument("arguments", nargs="*", help="for pytest")
    running = commands.add_parser("run", help="draw mutants and run their tests")
    running.add_argument("record", type=Path, help="file that `record` wrote")
    running.add_argument("out", type=Path, help="file of the table, which is continued if it exists")
    running.add_argument("--seed", type=int, default=14, help="of the draw (14)")
    running.add_argument("--number", type=int, default=120, help="of mutants (120)")
    running.add_argument("--limit", type=float, default=60, help="seconds of tests for a mutant (60)")
    running.add_argument(
        "--missed", action="store_true", help="run only the mutants that the table has as not detected"
    )
    running.add_argument("arguments", nargs="*", help="for pytest")
    testing = commands.add_parser("tests", help="used by `run`: run the tests that a file names")
    testing.add_argument("answer", type=Path)
    asked = parser.parse_args()
    if asked.command == "record":
        record(asked.out, asked.arguments)
    elif asked.command == "tests":
        run_in_new_process(asked.answer)
    else:
        mutants = draw(ROOT, asked.number, asked.seed)
        if asked.missed:
            rows = json.loads(asked.out.read_text(encoding="utf-8"))
            missed = {(row["file"], row["line"], row["after"]) for row in rows if not row["detected"]}
            mutants = [m for m in mutants if (m.file, m.line, m.after) in missed]
        run(asked.record, asked.out, mutants, asked.limit, asked.arguments)


if __name__ == "__main__":
    command_line()
