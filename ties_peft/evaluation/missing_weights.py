"""Missing: the tensors of a model that its files do not hold. transformers draws them at random as it loads them.

A base without the head that was asked for is loaded with a drawn one, and another at the next loading: whatever
is measured through it is chance. transformers' remark on it is silenced with its others, and it is an error here.
What the model's answer does not depend on, such as an encoder's pooler, may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError


def find_missing_weights(model: Any, info: dict[str, Any], answer: Callable[[], Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that were drawn and on which the model's answer depends, by their names in the model.

    Args:
        model: as `from_pretrained(…, output_loading_info=True)` gives it.
        info: what it says beside it; of its `missing_keys` the tied ones that are there under another name are left out
            by transformers. transformers 4 names them as the files would, with the base's prefix or without.
        answer: runs the model on anything and gives what is judged.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    front = f"{getattr(model, 'base_model_prefix', '')}."
    names = [
        next((n for n in (key, front + key, key.removeprefix(front)) if n in held), None)
        for key in sorted(info["missing_keys"])
    ]
    found = {name: held[name] for name in names if name is not None}
    return found if not found else _used(found, answer)


def check_missing_weights(
    missing: dict[str, nn.Parameter], supplied: Collection[int], base: str, form: str, adapter: str | None
) -> None:
    """Refuse to judge by tensors that were drawn.

    Args:
        missing: from `find_missing_weights`.
        supplied: the ids of the parameters that an adapter brings whole.
        base, form, adapter: for the message; adapter None is the bare base.
    Raises: CompatibilityError naming the tensors.
    """
    names = [name for name, parameter in missing.items() if id(parameter) not in supplied]
    if not names:
        return
    them = "it" if len(names) == 1 else "them"
    who = f"adapter '{adapter}' does not bring {them}" if adapter else f"nothing brings {them}"
    raise CompatibilityError(
        f"the files of base model '{base}', loaded as {form}, hold no {_listed(names)}: transformers began {them} anew, at "
        f"random, and {who}, so the answers would be chance. Name a base that was saved with {them}, or an adapter that "
        "was (modules_to_save; PEFT does so for the head of a SEQ_CLS adapter)."
    )


@contextmanager
def silenced(transformers: Any) -> Iterator[None]:
    """No progress bars and remarks while a model is loaded."""
    before = transformers.logging.get_verbosity()
    bars = getattr(transformers.logging, "is_progress_bar_enabled", lambda: True)()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()


def _used(found: dict[str, nn.Parameter], answer: Callable[[], Tensor]) -> dict[str, nn.Parameter]:
    """Those that the answer depends on: that have a gradient. All, where no gradient can be had."""
    parameters = list(found.values())
    try:
        with torch.enable_grad():
            slopes = torch.autograd.grad(answer().float().sum(), parameters, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, IndexError):  # frozen or quantised, or a model that wants other inputs
        return found
    return {name: own for (name, own), slope in zip(found.items(), slopes, strict=True) if slope is not None}


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
