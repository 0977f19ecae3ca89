"""Find the tensors of a model that its files do not hold, which transformers draws at random when it loads the model.

A base without a head is loaded with a random head, a different one each time, so that every score with it is chance.
transformers only warns of this, and its warnings are silenced here; this package raises an error instead.
Tensors that the model's output does not depend on, such as an encoder's pooler, may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError, some


def find_missing_weights(model: Any, info: dict[str, Any], output: Callable[[], Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters that were drawn at random and that the model's output depends on, by name.

    Args:
        model: from `from_pretrained(…, output_loading_info=True)`.
        info: the loading info. Its `missing_keys` leave out tied tensors that the files hold under another name. In
            transformers 4 they may have the base's prefix where the model's own names have none, and the reverse.
        output: runs the model on any input and returns its output.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [
        next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in held), None)
        for key in sorted(info["missing_keys"])
    ]
    found = {name: held[name] for name in names if name is not None}
    return found if not found else _used(found, output)


def check_missing_weights(
    missing: dict[str, nn.Parameter], replaced: Collection[int], base: str, form: str, adapter: str | None
) -> None:
    """Refuse to evaluate with tensors that were drawn at random.

    Args:
        missing: from `find_missing_weights`.
        replaced: the ids of the parameters that the adapter replaces.
        base, form, adapter: for the message; adapter None is the bare base.
    Raises: CompatibilityError naming the tensors.
    """
    names = [name for name, parameter in missing.items() if id(parameter) not in replaced]
    if not names:
        return
    holder = f", and neither does adapter '{adapter}'" if adapter else ""
    raise CompatibilityError(
        f"the files of base model '{base}', loaded as {form}, do not hold {some(names)}{holder}. transformers drew these "
        "tensors at random, so the results would be chance. Name a base that was saved with them, or an adapter that was "
        "(modules_to_save; PEFT saves the head of a SEQ_CLS adapter)."
    )


@contextmanager
def silenced(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, and the Hub's on retries, within a `with` block."""
    from huggingface_hub.utils import logging as hub

    shown = transformers.logging
    levels = [(own, own.get_verbosity()) for own in (shown, hub)]
    bars = getattr(shown, "is_progress_bar_enabled", lambda: True)()
    shown.disable_progress_bar()
    for own, _ in levels:
        own.set_verbosity_error()
    try:
        yield
    finally:
        for own, level in levels:
            own.set_verbosity(level)
        if bars:
            shown.enable_progress_bar()


def _used(found: dict[str, nn.Parameter], output: Callable[[], Tensor]) -> dict[str, nn.Parameter]:
    """Return those that the output depends on, that is, that have a gradient; all where no gradient can be computed."""
    parameters = list(found.values())
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(output().float().sum(), parameters, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, IndexError):  # frozen or quantised, or a model with other inputs
        return found
    return {name: own for (name, own), gradient in zip(found.items(), gradients, strict=True) if gradient is not None}
