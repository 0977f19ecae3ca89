"""Load a base model once, and apply one adapter after the other to its weights.

An adapter's task vectors are added to the weights in the model's dtype, and afterwards the original tensors are put
back. So any adapter that ties_peft reads can be evaluated without PEFT, and a merge in memory too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.extra_tensors import BASE, TOKENS, ExtraTensor, shape_text
from ..adapters.sources import is_hub_name, local_path, similar_folder
from ..adapters.types.base import BIAS, EXPERT, ModuleInfo
from ..errors import CompatibilityError, RecipeError, error_text, first_rows, unknown
from ..merging.options import DTYPES
from ..merging.values import check_device
from .missing_weights import check_missing_weights, find_missing_weights, silenced

AUTO_CLASSES = {  # the forms of a base model, and the class of transformers that loads each
    "encoder": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
LANGUAGE = "language"  # stands for causal or seq2seq; the model's config says which
NAME_BASE = "Name a folder that save_pretrained wrote, with its tokenizer, or an id on the Hub (base: in the task, base=, or --base)."
UNLIMITED = 1 << 30  # tokens, where the config names no number of positions
FORM_OF_MEASURE = {"descriptions": "encoder", "head": "classifier"}  # all other measures need a language model


class Bench:
    """A base model in evaluation mode, its tokenizer, and where it runs.

    Args:
        model: a transformers model, or one that PEFT has wrapped; PEFT's active adapters stay active.
        tokenizer: of the model.
        base: the name that messages use.
        form: `encoder`, `classifier`, `causal` or `seq2seq`.

    Attributes:
        device: of the model.
        active_adapter: the adapter that is applied; None for the bare base.
    """

    def __init__(self, model: Any, tokenizer: Any, base: str = "in memory", form: str | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.base = base
        self.form = form or form_of(model)
        self.device: torch.device = next(iter(model.parameters())).device
        self.active_adapter: Adapter | None = None
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.pad_token_id  # by which classifiers of causal models find the last real token
        self._modules = dict(unwrapped(model).named_modules())
        self._missing: dict[str, nn.Parameter] = {}
        self._replaced_ids: list[int] = []  # ids of the parameters that the active adapter replaces

    @classmethod
    def load(
        cls,
        base: str | Path,
        form: str,
        device: str = "cpu",
        token: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Bench:
        """Load a base model and its tokenizer, from a folder or from the Hub.

        Args:
            base: a folder, or a Hub id.
            form: `encoder`, `classifier`, `causal`, `seq2seq`, or `language` for one of the last two,
                depending on the model's config.
            device: where it runs.
            token: for private repositories.
            dtype: the precision of the weights; None for what transformers chooses (that of the files since its
                version 5, float32 before).
        Raises: RecipeError where there is no such model, or the device or the precision cannot be used.
        Law: where the model's files lack tensors that its output depends on, it runs only with an adapter that has
            them; else `check_complete` and every forward pass raise CompatibilityError.
        """
        import transformers

        place = check_device(device)
        if local_path(str(base)) is None and not is_hub_name(str(base)):
            raise RecipeError(f"base model '{base}': there is no such folder.{similar_folder(str(base))} {NAME_BASE}")
        precision = _precision(dtype, transformers.__version__)
        try:
            with silenced(transformers):
                if form == LANGUAGE:
                    config = transformers.AutoConfig.from_pretrained(base, token=token)
                    form = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
                loader = getattr(transformers, AUTO_CLASSES[form])
                model, info = loader.from_pretrained(base, token=token, output_loading_info=True, **precision)
                tokenizer = transformers.AutoTokenizer.from_pretrained(base, token=token)
        except Exception as error:  # transformers', the Hub's and the file system's own
            wanted = f"{AUTO_CLASSES.get(form, 'a language model')} ({error_text(error)})."
            if local_path(str(base)) is None:
                raise RecipeError(
                    f"base model '{base}': there is no such folder here, and it cannot be loaded from the Hub as {wanted}"
                    f"{similar_folder(str(base))} {NAME_BASE}"
                ) from None
            raise RecipeError(f"base model '{base}' cannot be loaded as {wanted} {NAME_BASE}") from None
        bench = cls(model.to(place), tokenizer, str(base), form)
        bench._missing = find_missing_weights(bench.model, info, bench._test_output)
        if bench._missing:
            bench.model.register_forward_pre_hook(lambda *_: bench._check_before_run())
        return bench

    @property
    def dtype(self) -> str:
        """The precision of the weights, such as "float32": the dtype of most of the parameters' entries."""
        entries: Counter[torch.dtype] = Counter()
        for parameter in self.model.parameters():
            entries[parameter.dtype] += parameter.numel()
        return str(entries.most_common(1)[0][0]).removeprefix("torch.")

    @property
    def pad_token_id(self) -> int:
        """The token that pads short rows; the attention mask excludes it."""
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if isinstance(found, int):
                return found
        return 0

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter that does not fit the model.

        Raises: CompatibilityError naming the modules that the model lacks, or whose shapes differ.
        """
        check_text_model(adapter)
        faults = [fault for name in adapter.modules if (fault := self._module_fault(adapter.module(name)))]
        faults += [fault for extra in _changing_extra_tensors(adapter) if (fault := self._extra_fault(extra))]
        if faults:
            raise CompatibilityError(
                f"adapter '{adapter.label}' (trained on {adapter.base_name or 'no name given'!r}) does not fit the "
                f"base model '{self.base}' ({type(unwrapped(self.model)).__name__}, loaded as {self.form}). Of its "
                f"{len(adapter.modules)} modules and its whole layers, {len(faults)} do not fit:\n"
                f"{first_rows([f'  {fault}' for fault in faults], 4)}\n{self._hint(adapter)}"
            )

    def check_complete(self, adapter: Adapter | None) -> None:
        """Refuse to evaluate with tensors that are neither in the base's files nor in the adapter (None: no adapter).

        Raises: CompatibilityError naming those tensors.
        """
        if self._missing:
            found = [
                self._parameter(_path(extra))
                for extra in (_changing_extra_tensors(adapter) if adapter else [])
                if extra.role != TOKENS
            ]
            label = None if adapter is None else adapter.label
            check_missing_weights(self._missing, [id(parameter) for parameter in found], self.base, self.form, label)

    def check_all(self, adapter: Adapter | None) -> None:
        """Make all checks of an adapter, or of the bare base (None), that can be made before the model runs.

        Raises: CompatibilityError as `check` and `check_complete`; AdapterError where its tensors hold NaN or infinity.
        """
        if adapter is not None:
            self.check(adapter)
            adapter.check()
        self.check_complete(adapter)

    @contextmanager
    def applied(self, adapter: Adapter | None) -> Iterator[Bench]:
        """Apply an adapter to the model's weights (and, for (IA)³, biases), within a `with` block.

        Args:
            adapter: None for the bare base.
        Raises: CompatibilityError where it does not fit; RuntimeError where another is applied.
        Law: afterwards the model has the very tensors that it had before.
        """
        if adapter is None:
            yield self
            return
        if self.active_adapter is not None:
            raise RuntimeError(f"the base already has '{self.active_adapter.label}' applied")
        self.check(adapter)
        with self._restored_afterwards() as saved:
            self.active_adapter = adapter
            with torch.no_grad():
                for name in adapter.modules:
                    self._apply_module(adapter, name, saved)
                self._apply_extra_tensors(adapter, saved)
            yield self

    @contextmanager
    def applied_extra_tensors(self, adapter: Adapter) -> Iterator[Bench]:
        """Apply only an adapter's extra tensors, such as its task's head, within a `with` block.

        Law: afterwards the model has the very tensors that it had before. It may be used within `applied`.
        """
        with self._restored_afterwards() as saved:
            with torch.no_grad():
                self._apply_extra_tensors(adapter, saved)
            yield self

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Disable the adapters that PEFT holds in the model, within a `with` block."""
        if self.active_adapter is not None:
            raise RuntimeError(f"the base has '{self.active_adapter.label}' applied")
        disabled: AbstractContextManager[Any] = getattr(self.model, "disable_adapter", nullcontext)()
        return disabled

    def layer(self, name: str) -> nn.Module:
        """Return one layer of the base, by its path."""
        found: nn.Module = _base_layer(self._modules[name])
        return found

    @property
    def max_length(self) -> int:
        """The largest number of tokens that the model has positions for."""
        config = self.model.config
        found = getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))
        return found if isinstance(found, int) and found > 0 else UNLIMITED

    def all_token_ids(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Return the token ids of some texts, uncut."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return found

    def token_ids(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], int]:
        """Return the token ids of some texts, at most `most` each, and the number of texts that were cut."""
        found = self.all_token_ids(texts)
        limit = min(most, self.max_length)
        cut = [place for place, ids in enumerate(found) if len(ids) > limit]
        if cut:
            short = self.tokenizer([texts[place] for place in cut], truncation=True, max_length=limit)["input_ids"]
            for place, ids in zip(cut, short, strict=True):
                found[place] = ids
        return found, len(cut)

    def pad_batch(self, rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, Tensor]:
        """Return a batch of token ids of unequal lengths: input_ids and attention_mask, (rows, longest), int64."""
        width = max(1, *(len(row) for row in rows))
        gaps = [width - len(row) for row in rows]
        pad = self.pad_token_id
        ids = [[pad] * gap + [*row] if left else [*row] + [pad] * gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) if left else [1] * (width - gap) + [0] * gap for gap in gaps]
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def _hint(self, adapter: Adapter) -> str:
        """Return what to do about an adapter that does not fit; the same layers have a prefix in a model with a head."""
        prefix = f"{getattr(unwrapped(self.model), 'base_model_prefix', '')}."
        paths = [adapter.module(name).path for name in adapter.modules]
        if not any(path not in self._modules and _with_other_prefix(path, prefix) in self._modules for path in paths):
            return "Name the base that it was trained on."
        return (
            f"The model has these layers with another prefix ({prefix}…): the adapter was trained on another form of the "
            f"base, task_type {adapter.config.get('task_type')}. Choose a measure for that form: descriptions loads an "
            "encoder, head a classifier, all other measures a language model."
        )

    def _module_fault(self, module: ModuleInfo) -> str | None:
        if module.layer_type == EXPERT:
            return f"{module.name}: one expert of several, which cannot be applied yet"
        layer = self._modules.get(module.path)
        if module.layer_type == BIAS:
            held = getattr(_base_layer(layer), "bias", None)
            fits = held is not None and held.numel() == module.shape[0]
            return None if fits else f"{module.path}: the model has no bias of {module.shape[0]} there"
        weight = getattr(_base_layer(layer), "weight", None) if layer is not None else None
        if weight is None:
            return f"{module.name}: the model has no such layer"
        if not weight.dtype.is_floating_point:
            return f"{module.name}: its weight is {weight.dtype}; load the base unquantised"
        seen, shape = tuple(weight.shape), module.shape
        if len(shape) == 1:
            side = weight_shape(_base_layer(layer))[1 if module.on_input else 0]
            return None if side == shape[0] else f"{module.name}: a vector of {shape[0]} for a side of {side}"
        fits = weight_shape(_base_layer(layer)) == shape if weight.dim() == 2 else weight.numel() == shape[0] * shape[1]
        return None if fits else f"{module.name}: {shape[0]} × {shape[1]} for a weight of {shape_text(seen)}"

    def _parameter(self, path: str) -> nn.Parameter | None:
        owner, _, name = path.rpartition(".")
        found = getattr(self._modules[owner], name, None) if owner in self._modules else None
        return found if isinstance(found, nn.Parameter) else None

    def _apply_module(self, adapter: Adapter, name: str, saved: list[tuple[nn.Parameter, Tensor]]) -> None:
        module = adapter.module(name)
        layer: Any = self.layer(module.path)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        delta = adapter.delta(name).to(weight.device)
        if module.layer_type == BIAS:
            _replace(layer.bias, layer.bias.float() + delta[:, 0], saved)
        elif len(module.shape) == 2:
            oriented = delta.T if transposed(layer) else delta
            _replace(weight, weight.float() + oriented.reshape(weight.shape), saved)
        else:
            shape = [1] * weight.dim()
            shape[weight_dimension(layer, module.on_input)] = -1
            _replace(weight, weight.float() * (1 + delta).reshape(shape), saved)
            if bias is not None and not module.on_input:
                _replace(bias, bias.float() * (1 + delta), saved)

    def _extra_fault(self, extra: ExtraTensor) -> str | None:
        """Return why an extra tensor does not fit the model; None where it fits."""
        parameter = self._parameter(_path(extra))
        if parameter is None:
            return f"{_path(extra)}: the model has no such tensor"
        shape = (max(extra.rows, default=0) + 1, *extra.shape[1:]) if extra.role == TOKENS else extra.shape
        seen = tuple(parameter.shape)
        fits = seen[0] >= shape[0] and seen[1:] == shape[1:] if extra.role == TOKENS else seen == shape
        return None if fits else f"{_path(extra)}: {shape_text(shape)} for {shape_text(seen)}"

    def _apply_extra_tensors(self, adapter: Adapter, saved: list[tuple[nn.Parameter, Tensor]]) -> None:
        for extra in _changing_extra_tensors(adapter):
            parameter, value = self._parameter(_path(extra)), adapter.tensors.read(extra.key)
            if parameter is None:
                raise CompatibilityError(f"adapter '{adapter.label}': {self._extra_fault(extra)}.")
            if extra.role == TOKENS:
                rows = parameter.data.clone()
                rows[torch.tensor(extra.rows, device=rows.device)] = value.to(rows.device, rows.dtype)
                value = rows
            else:
                self._replaced_ids.append(id(parameter))
            _replace(parameter, value, saved)

    @contextmanager
    def _restored_afterwards(self) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """Put back the tensors that are added to the yielded list, after a `with` block."""
        saved: list[tuple[nn.Parameter, Tensor]] = []
        replaced, active = len(self._replaced_ids), self.active_adapter
        try:
            yield saved
        finally:
            for parameter, data in reversed(saved):
                parameter.data = data
            del self._replaced_ids[replaced:]
            self.active_adapter = active

    def _check_before_run(self) -> None:
        """Refuse a forward pass with tensors that neither the files nor the active adapter hold."""
        label = self.active_adapter.label if self.active_adapter else None
        check_missing_weights(self._missing, self._replaced_ids, self.base, self.form, label)

    def _test_output(self) -> Tensor:
        """Return the model's output for two tokens."""
        ids = torch.ones(1, 2, dtype=torch.int64, device=self.device)
        written = {"labels": ids} if self.form == "seq2seq" else {}
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **written)
        found: Tensor = out.last_hidden_state if self.form == "encoder" else out.logits
        return found


def check_text_model(adapter: Adapter) -> None:
    """Refuse a LoRA of an image model, which no model of transformers runs.

    Raises: CompatibilityError.
    """
    if adapter.origin is not None and adapter.origin.parts:
        raise CompatibilityError(
            f"adapter '{adapter.label}' ({adapter.origin.title}) adapts {', '.join(adapter.origin.parts)} of an image model; "
            "expected an adapter of a language model or text encoder, because the work reads rows of text. Merge adapters of "
            "image models with ties-peft merge, and compare the images."
        )


def _precision(dtype: torch.dtype | str | None, version: str) -> dict[str, torch.dtype]:
    """Return the argument of `from_pretrained` that asks for a precision; its name depends on transformers' version.

    Raises: RecipeError where a base cannot be loaded in it.
    """
    if dtype is None:
        return {}
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RecipeError(unknown("precision", name, DTYPES))
    renamed = tuple(int(part) for part in version.split(".")[:2]) >= (4, 56)
    return {"dtype" if renamed else "torch_dtype": getattr(torch, name)}


def form_of(model: Any) -> str:
    """Return the form of a loaded model, `encoder`, `classifier`, `causal` or `seq2seq`, by its class."""
    name = type(unwrapped(model)).__name__
    if "SequenceClassification" in name:
        return "classifier"
    if getattr(model.config, "is_encoder_decoder", False) and "Conditional" in name:
        return "seq2seq"
    return "causal" if "CausalLM" in name or "LMHead" in name else "encoder"


def transposed(layer: nn.Module) -> bool:
    """Return whether a layer's weight is (in, out), as in GPT-2's Conv1D and in embeddings."""
    return type(layer).__name__ == "Conv1D" or isinstance(layer, nn.Embedding)


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return (out, in, …) of a layer."""
    shape = tuple(layer.weight.shape)
    return (shape[1], shape[0]) if transposed(layer) else shape


def weight_dimension(layer: nn.Module, on_input: bool) -> int:
    """Return the dimension of a layer's weight that goes over its inputs, or over its outputs."""
    return int(on_input != transposed(layer))


def _replace(parameter: nn.Parameter, value: Tensor, saved: list[tuple[nn.Parameter, Tensor]]) -> None:
    saved.append((parameter, parameter.data))
    parameter.data = value.to(parameter.device, parameter.dtype)


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _base_layer(layer: Any) -> Any:
    """Return the layer inside PEFT's."""
    return getattr(layer, "base_layer", layer)


def _changing_extra_tensors(adapter: Adapter) -> list[ExtraTensor]:
    """Return the extra tensors that change the model: all but copies of the base's own weights."""
    return [extra for extra in adapter.extra_tensors() if extra.role != BASE]


def _path(extra: ExtraTensor) -> str:
    """Return the path of an extra tensor in the model."""
    return f"{extra.module}.weight" if extra.role == TOKENS else f"{extra.module}.{extra.tensor}"


def _with_other_prefix(path: str, prefix: str) -> str:
    """Return a path without a model's prefix, or with it where it has none."""
    return path.removeprefix(prefix) if path.startswith(prefix) else prefix + path
