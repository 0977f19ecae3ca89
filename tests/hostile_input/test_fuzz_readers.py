"""Any bytes give a result or one TiesPeftError: never another exception, a hang, or memory beyond the file's."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.run_command import within
from conftest import SHAPES, lora_config, lora_tensors
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ties_peft import Adapter, Recipe, TiesPeftError, convert, merge
from ties_peft.adapters.base_model import BaseModel
from ties_peft.analysis import inspection

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SOUND = lora_config(SHAPES, 4, 8)
TENSORS = lora_tensors(SHAPES, 4, seed=0)
SAFE = save(TENSORS)
SECONDS = 20  # far more than any file of a few KB needs

TRIES = int(os.environ.get("FUZZ", 0))  # of each test, anew each time; 0 for the few that are always the same

fuzzed = settings(
    max_examples=TRIES or 150,
    deadline=None,
    derandomize=not TRIES,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

fewer = settings(fuzzed, max_examples=TRIES or 60)

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**310)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["LORA", "IA3", "(a+)+b", "q", ".*", "[", "../x", "\x1b[31m", "none", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OTHERS = """alpha_pattern rank_pattern use_rslora use_dora modules_to_save bias lora_bias fan_in_fan_out init_lora_weights
    layer_replication target_parameters feedforward_modules trainable_token_indices layers_to_transform exclude_modules
    revision inference_mode"""
keys = st.sampled_from([*SOUND, *OTHERS.split()]) | st.text(max_size=8)


def survives(folder: Path) -> None:
    """Everything that reads an adapter, on this one; `inspect` tells of any."""
    with within(SECONDS):
        seen = inspection.inspect([str(folder)])
        assert len(seen.adapters) + len(seen.refused) == 1
        assert "\x1b" not in json.dumps(seen.to_dict(), default=str, ensure_ascii=False)
        try:
            adapter = Adapter.load(folder)
            adapter.check()
            for name in adapter.modules:
                adapter.delta(name)
            merge([adapter], method="average")
        except TiesPeftError as error:
            assert "\x1b" not in str(error)
            assert 10 < len(str(error)) < 4000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """place(config=…, weights=…, name=…) → a folder with those bytes in it."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()

    def write(config: bytes = json.dumps(SOUND).encode(), weights: bytes = SAFE, name: str = WEIGHTS) -> Path:
        for old in folder.iterdir():
            old.unlink()
        (folder / CONFIG).write_bytes(config)
        (folder / name).write_bytes(weights)
        return folder

    return write


@fuzzed
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_config(place: Callable[..., Path], content: bytes) -> None:
    survives(place(config=content))


@fuzzed
@given(changes=st.dictionaries(keys, json_values, min_size=1, max_size=4), dropped=st.sets(keys, max_size=2))
@example(changes={"alpha_pattern": {"(a+)+b|(l+.*)*x": 3}}, dropped=set())
@example(changes={"lora_alpha": 10**400}, dropped=set())
@example(changes={"peft_type": "\ud800"}, dropped=set())
@example(changes={"target_parameters": 7.5, "target_modules": {}}, dropped=set())
@example(changes={"target_parameters": ["x", 3], "target_modules": []}, dropped=set())
def test_any_values_in_a_config(place: Callable[..., Path], changes: dict[str, Any], dropped: set[str]) -> None:
    config = {key: value for key, value in (SOUND | changes).items() if key not in dropped}
    survives(place(config=json.dumps(config).encode()))


def header(table: Any, length: int | None = None, rest: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "X", 3, None]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 10, 2**31, 2**62, -1]), max_size=4) | json_values,
        "data_offsets": st.lists(st.sampled_from([0, 1, 16, 64, 2**40, 2**63, -1]), max_size=3),
    },
)
ODD = (
    "__metadata__",
    "",
    "../../x",
    *(
        f"base_model.model.{name}"
        for name in ("x.lora_A.weight", ".lora_A.weight", "q.lora_embedding_A", "q.ia3_l", "score.weight")
    ),
)
names = st.sampled_from([*TENSORS, *ODD])


PARTS = {
    "LORA": "lora_A.weight lora_B.weight lora_B.bias lora_embedding_A lora_embedding_B lora_magnitude_vector",
    "IA3": "ia3_l",
    "ADALORA": "lora_A lora_B lora_E",
    "LOHA": "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
    "LOKR": "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
    "VERA": "vera_lambda_b vera_lambda_d vera_A vera_B",
    "HRA": "hra_u",
    "SHIRA": "shira_weight shira_indices",
}
PATHS = [
    "q",
    "layers.0.q",
    "conv",
    "mha",
    "mha.base_layer.out_proj",
    "mlp.experts",
    "mlp.experts.base_layer",
    "mlp.experts.base_layer.base_layer",
]
WHOLE = [
    "score.weight",
    "score.modules_to_save.weight",
    "score.original_module.weight",
    "q.base_layer.bias",
    "lm_head.base_layer.weight",
    "embed.token_adapter.trainable_tokens_delta",
    "q.bias",
]
FORMS = {
    "use_dora": [True],
    "lora_bias": [True],
    "target_modules": [[], ["q"], "(a+)+b", None],
    "target_parameters": [["mlp.experts.down_proj", "experts.gate_up_proj"], ["w"], 3],
    "trainable_token_indices": [[1, 2], {"embed": [1]}, {"": [0]}, [[]]],
    "r": [0, 1, 2, -1],
    "layer_replication": [[[0, 2]], "x"],
    "save_projection": [False],
}


@st.composite
def kinds(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A config and tensors with the names of some kind, and of whole layers, of any small shapes."""
    kind = draw(st.sampled_from(sorted(PARTS)))
    chosen = draw(st.dictionaries(st.sampled_from(sorted(FORMS)), st.integers(0, 3), max_size=3))
    ends = [f"{path}.{part}" for path in PATHS for part in PARTS[kind].split()]
    found = draw(st.dictionaries(st.sampled_from(ends), st.lists(st.integers(0, 3), max_size=5), max_size=6))
    if draw(st.booleans()):  # one sound layer, so that the others do not lie behind its absence
        found |= {f"q.{part}": [2] * (3 - part.count("_")) for part in PARTS[kind].split()[:2]}
    found |= draw(st.dictionaries(st.sampled_from(WHOLE), st.lists(st.integers(0, 3), max_size=3), max_size=3))
    config = {"peft_type": kind, **{key: FORMS[key][at % len(FORMS[key])] for key, at in chosen.items()}}
    return config, {f"base_model.model.{name}": torch.ones(shape) for name, shape in found.items()}


@fewer
@given(made=kinds())
@example(
    made=({"peft_type": "LORA", "target_parameters": 3}, {n.replace("layers.0.", ""): t for n, t in TENSORS.items()})
)
def test_any_shapes_of_any_kind(
    place: Callable[..., Path], made: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    config, tensors = made
    survives(place(config=json.dumps(config).encode(), weights=save(tensors)))


STRANGE = [
    "unet.a.to_q.lora.down.weight",
    "unet.a.to_q.lora.up.weight",
    "unet.a.to_q.lora_A.weight",
    "unet.a.to_q.alpha",
    "a.processor.to_q_lora.down.weight",
    "a.processor.to_q_lora.up.weight",
    "lora_unet_a_to_q.lora_down.weight",
    "lora_unet_a_to_q.lora_up.weight",
    "lora_unet_a_to_q.alpha",
    "lora_te_a.lora_down.weight",
    "lora_unet_a.hada_w1_a",
    "layers.0.q.lora_a",
    "layers.0.q.lora_b",
    "layers.0.q.m",
    "q.lora_A.weight",
    "q.lora_B.weight",
]


@fewer
@given(
    held=st.dictionaries(st.sampled_from(STRANGE), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=6),
    config=st.none() | st.dictionaries(st.sampled_from(["lora_parameters", "fine_tune_type", "scale"]), json_values),
    alpha=st.none() | st.floats(),
)
def test_any_shapes_in_files_of_others(
    tmp_path_factory: pytest.TempPathFactory,
    held: dict[str, list[int]],
    config: dict[str, Any] | None,
    alpha: float | None,
) -> None:
    """Known or not, converted or refused."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "adapters.safetensors").write_bytes(save({name: torch.ones(shape) for name, shape in held.items()}))
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    survives(folder)
    with within(SECONDS):
        try:
            convert(folder, alpha=alpha)
        except TiesPeftError as error:
            assert "\x1b" not in str(error)


@fewer
@given(table=json_values | st.fixed_dictionaries({"weight_map": json_values | st.dictionaries(names, json_values)}))
@example(table={"weight_map": {"x": "../../etc/passwd"}})
@example(table={"weight_map": {"x": ""}})
@example(table={"weight_map": {"x": "n" * 500}})
def test_any_index_of_a_base_model(tmp_path_factory: pytest.TempPathFactory, table: Any) -> None:
    folder = tmp_path_factory.mktemp("base")
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    with within(SECONDS):
        try:
            BaseModel.load(folder).require("x", "the test")
        except TiesPeftError as error:
            assert "\x1b" not in str(error)


@fuzzed
@given(content=st.binary(max_size=400))
def test_any_bytes_as_weights(place: Callable[..., Path], content: bytes) -> None:
    survives(place(weights=content))


@fuzzed
@given(
    table=st.dictionaries(names, entries | json_values, max_size=4) | json_values,
    length=st.none() | st.sampled_from([0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1]),
    rest=st.binary(max_size=64),
)
def test_any_header_of_safetensors(place: Callable[..., Path], table: Any, length: int | None, rest: bytes) -> None:
    survives(place(weights=header(table, length, rest)))


@fuzzed
@given(at=st.integers(0, len(SAFE) - 1), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_one_byte_of_sound_weights_changed(place: Callable[..., Path], at: int, byte: int, cut: int) -> None:
    survives(place(weights=SAFE[:at] + bytes([byte]) + SAFE[at + 1 : len(SAFE) - cut]))


def pickled(value: Any, **options: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


ZIPPED, LEGACY = pickled(TENSORS), pickled(TENSORS, _use_new_zipfile_serialization=False)


@fuzzed
@given(content=st.binary(max_size=300))
def test_any_bytes_as_an_old_bin(place: Callable[..., Path], content: bytes) -> None:
    survives(place(weights=content, name=PICKLE))


@fuzzed
@given(legacy=st.booleans(), at=st.floats(0, 1, exclude_max=True), patch=st.binary(max_size=6), cut=st.integers(0, 200))
def test_a_few_bytes_of_a_sound_bin_changed(
    place: Callable[..., Path], legacy: bool, at: float, patch: bytes, cut: int
) -> None:
    sound = LEGACY if legacy else ZIPPED
    start = int(at * len(sound))
    survives(place(weights=(sound[:start] + patch + sound[start + len(patch) :])[: len(sound) - cut], name=PICKLE))


class _Runs:
    """What a pickle can ask for: here, to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(6))
def test_no_code_in_a_bin_is_run(place: Callable[..., Path], tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    folder = place(weights=pickle.dumps({"a": _Runs(mark)}, protocol=protocol), name=PICKLE)
    with pytest.raises(TiesPeftError):
        Adapter.load(folder)
    with pytest.raises(TiesPeftError, match="could run code"):
        Adapter.load(place(weights=pickled({"a": _Runs(mark)}), name=PICKLE))
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Runs(mark)))  # the same pickle, loaded as it must not be
    assert mark.exists()


def test_an_archive_that_inflates_is_not_opened(place: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "large.bin"
    torch.save({"base_model.model.q.lora_A.weight": torch.zeros(2_000_000)}, source)
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert packed.stat().st_size < source.stat().st_size / 100
    with pytest.raises(TiesPeftError, match="would unpack from"):
        Adapter.load(place(weights=packed.read_bytes(), name=PICKLE))


def test_a_shape_larger_than_its_storage_is_refused(place: Callable[..., Path]) -> None:
    """One number that says it is 2⁴⁰ of them: reading it would take 4 TB."""
    vast = torch.zeros(1).expand(1 << 20, 1 << 20)
    folder = place(weights=pickled({**TENSORS, "base_model.model.layers.0.q.lora_A.weight": vast}), name=PICKLE)
    with pytest.raises(TiesPeftError, match="more numbers than the file holds"):
        Adapter.load(folder)


@fuzzed
@given(text=st.text(max_size=200))
@example(text="merge_method: ties\nadapters: &a [*a]")
@example(text="a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: &d [*c,*c]\nadapters: [*d,*d]")
@example(text="!!python/object/apply:os.system ['true']")
def test_any_text_as_a_recipe(text: str) -> None:
    with within(SECONDS):
        try:
            Recipe.from_yaml(text)
        except TiesPeftError as error:
            assert "\x1b" not in str(error)
