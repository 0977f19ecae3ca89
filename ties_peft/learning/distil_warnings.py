"""Warnings of a distillation: what is possible but unwise, in sentences for the report and for standard error.

Each is given as soon as it is known: what was asked for before any work, the rows that adapters wrote before they predict,
and the result at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from .distilled import TeacherResult
from .teacher_specs import TeacherSpec, prompt_pieces
from .teachers import Teacher

# Under this share of distinct rows a row occurs more than twice in the mean, so that most held-out rows are fitted as well,
# and the agreement on them does not tell what the result predicts for other rows.
FEW_DISTINCT = 0.5


def request_warnings(specs: Sequence[TeacherSpec], teachers: Sequence[Teacher]) -> list[str]:
    """Return the warnings of what was asked for.

    Args:
        specs: the adapters, as the user asked for them.
        teachers: of each adapter; a last one may be the base.
    """
    return _without_empty([_random_rows(specs, teachers), _free_rows(specs), _unused_choices(specs, teachers)])


def row_warnings(teachers: Sequence[Teacher]) -> list[str]:
    """Return the warnings of the rows that the adapters wrote: a line that names those that wrote few distinct ones."""
    counted = [(teacher.name, made) for teacher in teachers if (made := teacher.count_written()) is not None]
    few = [
        f"{name} ({made.distinct} of {made.rows} are distinct, {made.empty} are empty)"
        for name, made in counted
        if made.distinct < FEW_DISTINCT * made.rows
    ]
    if not few:
        return []
    return [
        f"few of the generated rows are of use: {', '.join(few)}. An adapter that was trained on answers alone, without the "
        "prompts, writes prompts no better than its base, and agreement on such rows says little about its task. Give prompts "
        "(--rows FILE or rows=)."
    ]


def result_warnings(
    specs: Sequence[TeacherSpec], teachers: Sequence[Teacher], results: Sequence[TeacherResult], improved: bool
) -> list[str]:
    """Return the warnings of a result.

    Args:
        specs, teachers: as in `request_warnings`.
        results: of each teacher.
        improved: whether the result is better than the start in the mean.
    """
    found = [
        _worse_results(results),
        ""
        if improved
        else "no step improved the adapter on the held-out rows, so the result is the start itself. More rows, or rows closer to "
        "the adapters' tasks, may help.",
        _own_heads(specs, teachers),
    ]
    return _without_empty(found)


def _without_empty(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if text]


def _random_rows(specs: Sequence[TeacherSpec], teachers: Sequence[Teacher]) -> str:
    """Say which adapters of a causal model were imitated on random tokens, because no rows were given."""
    names = [spec.name for spec in specs if spec.rows.by_default]
    if teachers[0].bench.form != "causal" or not names:
        return ""
    count = next(spec.rows.count for spec in specs if spec.rows.by_default)
    return (
        f"no rows were given for {', '.join(names)}, so {count} rows of random tokens are used for each. A language model is "
        "imitated better on real prompts or texts of the adapters' tasks: give them, once for each adapter (--rows FILE or rows=)."
    )


def _free_rows(specs: Sequence[TeacherSpec]) -> str:
    """Name the adapters that write free text although they have a task, because it does not say what its prompts look like."""
    names = [
        spec.name
        for spec in specs
        if spec.rows.generated and spec.task is not None and spec.task.label is not None
        if not any(prompt_pieces(spec.task))
    ]
    if not names:
        return ""
    return (
        f"the tasks of {', '.join(names)} do not say how a prompt ends, so these adapters write free text, and all of its tokens "
        "are matched. Say what a prompt looks like (template, or prompt_format where the rows hold whole prompts), with text "
        "behind {text}; then only the answers are matched."
    )


def _unused_choices(specs: Sequence[TeacherSpec], teachers: Sequence[Teacher]) -> str:
    """Name the adapters whose tasks have choices that are not compared."""
    names = [
        spec.name
        for spec, teacher in zip(specs, teachers, strict=False)  # a last teacher may be the base
        if spec.task is not None and spec.task.choices is not None and not getattr(teacher, "choices", ())
    ]
    if not names:
        return ""
    return (
        f"the choices of the tasks of {', '.join(names)} are not used, because two begin with the same token, or there are no "
        "answers. The predictions of the next token are matched."
    )


def _worse_results(results: Sequence[TeacherResult]) -> str:
    """Name the adapters that the result imitates worse than the start does."""
    worse = [
        f"{line.name} ({', '.join(line.worse)}, {line.held} row{'s' * (line.held != 1)})"
        for line in results
        if line.worse
    ]
    if not worse:
        return ""
    return (
        "on the held-out rows the result imitates these worse than the start does, by the figures named: "
        f"{', '.join(worse)}. Rows closer to their tasks "
        "(--rows or rows=), or a larger weight for them (--weights or weights=), may help."
    )


def _own_heads(specs: Sequence[TeacherSpec], teachers: Sequence[Teacher]) -> str:
    """Say that the heads of classifiers are not in the result."""
    if teachers[0].bench.form != "classifier" or not any(spec.adapter.extra_keys for spec in specs):
        return ""
    return (
        "each adapter was imitated with its own head, and the result has no head: load the base model with the head of the task "
        "that you use it for."
    )
