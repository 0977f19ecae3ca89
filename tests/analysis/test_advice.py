"""Each rule of the advice: what triggers it, the figure it states, the option it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ties_peft
from ties_peft.analysis.advice import WARNING, Advice, Facts, advise

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
WIDE = {"layers.0.q": (64, 48), "layers.0.up": (96, 64)}


def advice(words: str, folders: list[Path], *arguments: object, **options: object) -> Advice:
    """The only advice that holds some words."""
    analysis = ties_peft.analyze(folders, *arguments, **options)  # type: ignore[arg-type]
    (found,) = [one for one in analysis.advice if words in one.text]
    assert found.text in str(analysis).replace("\n", " ") or len(found.text) > 100
    return found


def test_nearly_the_same_adapters_share_one_weight(make_lora: Make) -> None:
    folders = [
        make_lora("a", seed=1, shapes=WIDE),
        make_lora("b", seed=2, shapes=WIDE),
        make_lora("c", seed=1, shapes=WIDE),
    ]
    found = advice("nearly the same", folders, methods=[])
    assert "a, c" in found.text and "1.000" in found.text
    assert (found.option, found.severity) == ("--weights 0.5,1,0.5", WARNING)


def test_unequal_norms_name_both_and_their_ratio(make_lora: Make) -> None:
    folders = [make_lora("a", seed=1, shapes=WIDE), make_lora("b", seed=2, shapes=WIDE, gain=5)]
    analysis = ties_peft.analyze(folders, methods=[])
    (found,) = [one for one in analysis.advice if one.option == "--weights norm"]
    small, large = analysis.adapters["norm"]
    assert f"{large / small:.1f} times" in found.text and f"{small:.3g}" in found.text
    even = ties_peft.analyze([folders[0], make_lora("c", seed=3, shapes=WIDE)], methods=[])
    assert all(one.option != "--weights norm" for one in even.advice)


def test_a_method_that_leaves_little_names_one_that_leaves_more(make_lora: Make) -> None:
    folders = [make_lora(name, seed=seed, shapes=WIDE) for seed, name in enumerate("abcd")]
    found = advice("average leaves little", folders, methods=["average", "iso_c"])
    assert "0.25" in found.text and found.option == "--method iso_c"
    alone = advice("average leaves little", folders, methods=["average"])
    assert alone.option == "--scale"


def test_an_adapter_of_zeros_is_named(make_lora: Make) -> None:
    folders = [make_lora("a", shapes=WIDE), make_lora("zero", shapes=WIDE, gain=0)]
    assert advice("zero changes nothing", folders, methods=[]).severity == WARNING


def test_modules_of_some_adapters_are_counted(make_lora: Make) -> None:
    folders = [make_lora("a", shapes=WIDE), make_lora("b", seed=1, shapes={"layers.0.q": (64, 48)})]
    assert "1 of 2 modules" in advice("belong to only some", folders, methods=[]).text


def test_a_rank_that_is_not_needed_and_one_that_is_too_small(make_lora: Make) -> None:
    folders = [make_lora("a", rank=2, shapes=WIDE), make_lora("b", rank=2, seed=1, shapes=WIDE)]
    found = advice("is not needed", folders, 0.2, 16, methods=["average"])
    assert "Rank 4 keeps 100.0%" in found.text and found.option == "--method average --rank 4"
    cut = advice("a larger rank keeps more", folders, 0.2, 1, methods=["average"])
    assert cut.option in ("--method average --rank 2", "--method average --rank max") and cut.text.startswith(
        "Rank 1 keeps"
    )


def test_no_rank_under_that_of_an_adapter_is_advised_nor_for_a_flat_spectrum(make_lora: Make) -> None:
    folders = [make_lora("a", rank=2, gain=100, shapes=WIDE), make_lora("b", rank=8, seed=1, shapes=WIDE)]
    analysis = ties_peft.analyze(folders, rank=20, methods=["auto", "task_arithmetic"])
    assert analysis.methods[1].rank_for(0.99) == 2
    (found,) = [one for one in analysis.advice if "is not needed" in one.text]
    assert found.text.startswith("Rank 8 keeps") and found.option == "--method task_arithmetic --rank 8"
    flat = ties_peft.analyze(folders, methods=["auto", "iso_c"])
    assert all(one.flat for one in flat.methods)
    assert not any("is not needed" in one.text for one in flat.advice)


def test_on_a_language_model_the_projection_advises_no_method_but_to_measure(make_lora: Make) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (64, 48)}
    for config in ({"task_type": "CAUSAL_LM"}, {"task_type": None}):  # the latter by the names of its modules
        folders = [make_lora(name, seed=seed, shapes=shapes, **config) for seed, name in enumerate("abcd")]
        analysis = ties_peft.analyze(folders, methods=["average", "iso_c"])
        assert analysis.methods[0].projection[0] < 0.34  # type: ignore[operator]
        texts = [one.text for one in analysis.advice]
        assert [one.option for one in analysis.advice if "--method" in (one.option or "")] == []
        assert not any("leaves little" in text for text in texts)
        assert sum("ties-peft evaluate" in text and "--bare --task" in text for text in texts) == 1
        assert not any("evaluate" in one.text for one in ties_peft.analyze(folders, methods=[]).advice)


def test_a_method_that_chose_another_is_named_with_it(make_lora: Make) -> None:
    folders = [make_lora("a", shapes=WIDE), make_lora("b", seed=1, shapes=WIDE)]
    lines = str(ties_peft.analyze(folders, methods=["auto", "ties"])).splitlines()
    assert any(line.startswith("auto (dual) ") for line in lines) and any(line.startswith("ties ") for line in lines)


def facts(**pairs: float) -> Facts:
    """Two adapters, of which one figure is not as usual."""
    usual = {"cosine": 0.0, "sign_conflict": 0.5, "excess_conflict": 0.0, "initial_cosine": 0.0}
    held = float(pairs.pop("redundancy", 0.8))
    adapters = {"norm": np.ones(2), "redundancy": np.array([held, 0.8])}
    return Facts("ab", adapters, {k: np.full((2, 2), v) for k, v in {**usual, **pairs}.items()}, 0.2, 3, 3, [])


@pytest.mark.parametrize(
    ("figures", "words", "option"),
    [
        ({"sign_conflict": 0.31, "excess_conflict": 0.08, "cosine": 0.3}, ("31%", "8 points", "0.30"), "--method ties"),
        ({"initial_cosine": 0.93}, ("a, b", "0.93"), None),
        ({"redundancy": 0.52}, ("52%", "of a,"), "--density 0.4"),
    ],
)
def test_a_rule_states_its_figure_and_its_option(
    figures: dict[str, float], words: tuple[str, ...], option: str | None
) -> None:
    (found,) = advise(facts(**figures))
    assert found.option == option and all(word in found.text for word in words)


def test_nothing_unusual_makes_no_advice() -> None:
    assert advise(facts()) == []


def test_warnings_come_first(make_lora: Make) -> None:
    folders = [make_lora("a", rank=2, shapes=WIDE), make_lora("b", rank=2, shapes=WIDE, gain=0)]
    found = [one.severity for one in ties_peft.analyze(folders, rank=16, methods=["average"]).advice]
    assert found == sorted(found, key=lambda severity: severity != WARNING) and len(set(found)) == 2
