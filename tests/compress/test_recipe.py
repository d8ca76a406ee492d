"""Recipes: what is accepted, what is refused and how, and which rule decides about a group."""

from pathlib import Path

import pytest

from pressd.compress.recipe import Rule, parse_recipe, read_recipe, recipe_of_scheme
from pressd.runtime.artifact.families import FusedGroup, Linear

EXAMPLE = """
source = "examples/pylm"
[calibration]
data = "stdlib"
tokens = 65536
seq_len = 512
seed = 0
[[pass]]
use = "rtn"
[scheme]
"*" = "w4a16g128"
"layers.0-1.*" = "w8a16g128"
"lm_head" = "keep"
[gates]
kl_mean = 0.05
top1_agreement = 0.93
"""


def group(name: str) -> FusedGroup:
    return FusedGroup(name=name, members=(Linear(prefix="x", out_features=1, in_features=1),))


def test_every_section_is_read() -> None:
    recipe = parse_recipe(EXAMPLE, "recipe")
    assert recipe.text == EXAMPLE
    assert recipe.source == "examples/pylm"
    assert [(rule.pattern, rule.scheme) for rule in recipe.rules] == [
        ("*", "w4a16g128"),
        ("layers.0-1.*", "w8a16g128"),
        ("lm_head", "keep"),
    ]
    assert recipe.gates == {"kl_mean": 0.05, "top1_agreement": 0.93}


def test_a_scheme_is_a_recipe_of_one_rule() -> None:
    recipe = recipe_of_scheme("w8a8")
    assert parse_recipe(recipe.text, "recipe") == recipe


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*", "layers.0.qkv", True),
        ("*", "lm_head", False),
        ("*", "embed", False),
        ("lm_head", "lm_head", True),
        ("embed", "lm_head", False),
        ("down", "layers.31.down", True),
        ("down", "layers.31.gate_up", False),
        ("layers.*.down", "layers.31.down", True),
        ("layers.*.*", "layers.31.down", True),
        ("layers.*.*", "lm_head", False),
        ("layers.1.*", "layers.1.o", True),
        ("layers.1.*", "layers.11.o", False),
        ("layers.2-10.qkv", "layers.9.qkv", True),
        ("layers.2-10.qkv", "layers.10.qkv", True),
        ("layers.2-10.qkv", "layers.11.qkv", False),
        ("layers.2-10.qkv", "layers.9.o", False),
    ],
)
def test_what_a_pattern_is_about(pattern: str, name: str, matches: bool) -> None:
    assert Rule(pattern=pattern, scheme="w8a8").matches(group(name)) is matches


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[scheme", "recipe: not valid TOML"),
        ("", "recipe: scheme: Field required"),
        ("[scheme]", "recipe: scheme: Dictionary should have at least 1 item"),
        ('[scheme]\n"*" = 4', "recipe: scheme.*: Input should be a valid string"),
        (
            '[scheme]\n"q" = "w8a8"',
            "recipe: scheme.'q' is not a pattern; use a name (*, qkv, o, gate_up, down, lm_head",
        ),
        ('[scheme]\n"layers.0.lm_head" = "keep"', "is not a pattern"),
        ('[scheme]\n"layers.a.*" = "keep"', "is not a pattern"),
        ('[shceme]\n"*" = "w8a8"', "shceme: Extra inputs are not permitted"),
        ('[calibration]\ntokns = 1\n[scheme]\n"*" = "w8a8"', "calibration.tokns: Extra inputs are not permitted"),
        ('[calibration]\ntokens = 0\n[scheme]\n"*" = "w8a8"', "calibration.tokens: Input should be greater than"),
        ('[gates]\nkl = 1\n[scheme]\n"*" = "w8a8"', "gates.kl: Extra inputs are not permitted"),
        ('[[pass]]\nuse = "gptp"\n[scheme]\n"*" = "w8a8"', "pass 'gptp' is not known; known now: rtn, gptq, awq, "),
        ('[[pass]]\ndamp = 0.01\n[scheme]\n"*" = "w8a8"', "pass None is not known; known now: rtn, gptq, awq, "),
        ('[[pass]]\nuse = "gptq"\ndamp = 0\n[scheme]\n"*" = "w8a8"', "pass 'gptq': damp: Input should be greater"),
        (
            '[[pass]]\nuse = "gptq"\nstep = 1\n[scheme]\n"*" = "w8a8"',
            "pass 'gptq' has no option 'step'; its options: act",
        ),
        ('[[pass]]\nuse = "gptq"\n[[pass]]\nuse = "gptq"\n[scheme]\n"*" = "w8a8"', "pass 'gptq' is there twice"),
        ('[[pass]]\nuse = "gptq"\n[[pass]]\nuse = "rtn"\n[scheme]\n"*" = "w8a8"', "both round weights; choose one"),
        ('[[pass]]\nuse = "rtn"\ndamp = 0.01\n[scheme]\n"*" = "w8a8"', "pass 'rtn' has no option 'damp'"),
    ],
)
def test_a_mistake_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^recipe: ") as caught:
        parse_recipe(text, "recipe")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"r\.toml: cannot be read"):
        read_recipe(tmp_path / "r.toml")
