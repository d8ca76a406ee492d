"""Plans: which group gets what, and which mistakes are found before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pressd.compress import compress
from pressd.compress.plan import make_plan
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.reader import Checkpoint


def schemes(source: Path, rules: str) -> dict[str, str]:
    plan = make_plan(Checkpoint.open(source), parse_recipe(f"[scheme]\n{rules}\n", "recipe"))
    return {group.group.name: group.scheme for group in plan.groups()}


def test_the_last_rule_that_matches_decides(tiny_llama: Path) -> None:
    found = schemes(tiny_llama, '"*" = "w4a16g32"\n"layers.1.*" = "w8a16"\n"down" = "w8a8"')
    assert found == {
        "embed": "keep",
        **{f"layers.0.{name}": "w4a16g32" for name in ("qkv", "o", "gate_up")},
        "layers.0.down": "w8a8",
        **{f"layers.1.{name}": "w8a16" for name in ("qkv", "o", "gate_up")},
        "layers.1.down": "w8a8",
        "lm_head": "keep",
    }


def test_a_tied_head_may_be_named_but_is_no_group(tiny_llama_tied: Path) -> None:
    found = schemes(tiny_llama_tied, '"*" = "w8a8"\n"lm_head" = "keep"')
    assert "lm_head" not in found


@pytest.mark.parametrize(
    ("rules", "head", "unties"),
    [
        ('"lm_head" = "w8a16"', "w8a16", True),
        ('"embed" = "w8a16"', None, False),  # the head is still the embedding, and pressed with it
        ('"embed" = "w8a16"\n"lm_head" = "keep"', "keep", True),
        ('"embed" = "w8a16"\n"lm_head" = "w8a16"', None, False),
        ('"*" = "bf16"\n"lm_head" = "bf16"', None, False),
    ],
)
def test_a_tied_head_is_untied_when_it_is_treated_otherwise(
    tiny_llama_tied: Path, rules: str, head: str | None, unties: bool
) -> None:
    plan = make_plan(Checkpoint.open(tiny_llama_tied), parse_recipe(f"[scheme]\n{rules}\n", "recipe"))
    assert (plan.unties, plan.model.tied) == (unties, not unties)
    assert {group.group.name: group.scheme for group in plan.groups()}.get("lm_head") == head


def test_a_rule_for_a_tied_head_that_cannot_hold_is_refused(tiny_llama_tied: Path) -> None:
    for rules in ('"lm_head" = "fp16"', '"*" = "bf16"\n"lm_head" = "fp16"'):
        with pytest.raises(
            ValueError, match=r"scheme.'lm_head': 'fp16' is not what the embedding, which it is tied to"
        ):
            schemes(tiny_llama_tied, rules)
    assert schemes(tiny_llama_tied, '"*" = "fp16"\n"lm_head" = "fp16"')["embed"] == "fp16"


def test_a_cast_is_of_everything_dense(tiny_llama: Path) -> None:
    recipe = parse_recipe('[scheme]\n"*" = "w8a8"\n"down" = "bf16"\n', "recipe")
    plan = make_plan(Checkpoint.open(tiny_llama), recipe)
    assert plan.dtype == torch.bfloat16
    assert {group.group.name: group.scheme for group in plan.groups()}["embed"] == "bf16"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ('"*" = "w4"', "scheme.'*': scheme 'w4' is not known; choose one of bf16"),
        ('"*" = "w8a8"\n"layers.2.*" = "w8a16"', "scheme.'layers.2.*' decides nothing: no group has that name"),
        ('"down" = "w8a8"\n"*" = "w8a16"', "scheme.'down' decides nothing"),
        ('"*" = "w4a16g128"', "layers.0.qkv: w4a16g128: in_features 64 is not a multiple of group size 128"),
        ('"down" = "w4a16g64"', "layers.0.down: w4a16g64: in_features 160 is not a multiple of group size 64; choose"),
        ('"embed" = "w8a8"', "scheme.'embed': w8a8: rows of an embedding are looked up, not multiplied; choose w8a16"),
        ('"embed" = "sparse24:w4a16"', "rows of an embedding are looked up"),
        ('"*" = "sparse24:w4a16g64"', "layers.0.qkv: sparse24:w4a16g64: stored columns 32 is not a multiple of group"),
        ('"*" = "lowrank64:bf16"', "layers.0.qkv: lowrank64:bf16: lowrank 64 is not below both sides of 64 x 64"),
        ('"o" = "lowrank33:w4a16g32"', "layers.0.o: lowrank33:w4a16g32: stored columns 33 is not a multiple of group"),
        (
            '"*" = "bf16+residual4"',
            "scheme 'bf16+residual4': bf16 loses nothing that a residual could correct; write bf16, or keep",
        ),
        ('"*" = "w8a16"\n"down" = "lowrank8:fp16"\n"o" = "bf16"', "dense tensors would be bfloat16 and float16"),
        ('"*" = "bf16"\n"down" = "fp16"', "dense tensors would be bfloat16 and float16; an artifact has one precision"),
        ('"*" = "bf16"\n"lm_head" = "keep"', "dense tensors would be bfloat16 and float32"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    tiny_llama: Path, rules: str, message: str, tmp_path: Path
) -> None:
    recipe = parse_recipe(f"[scheme]\n{rules}\n", "recipe")
    with pytest.raises(ValueError, match=r"^recipe: ") as caught:
        compress(tiny_llama, recipe, tmp_path / "deep" / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_served_is_not_pressed(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; only silu is computed"):
        compress(source, "w8a8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_pressed_is_not_pressed_again(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "w8a8", tmp_path / "once")
    with pytest.raises(ValueError, match="once is pressed already; press the dense checkpoint it was made from"):
        compress(tmp_path / "once", "w4a16", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_dense_artifact_can_be_pressed(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "bf16", tmp_path / "dense")
    manifest = compress(tmp_path / "dense", "w8a8", tmp_path / "pressed")
    assert manifest.source.path == str((tmp_path / "dense").resolve())
    shutil.rmtree(tmp_path / "dense")
    assert Checkpoint.open(tmp_path / "pressed").artifact_id == manifest.id
