"""The grammar of schemes, and what each costs."""

import itertools
import math

import pytest
import torch

from pressd.runtime.artifact.schemes import Scheme, parse_scheme


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_weight_only_schemes(bits: int, group_size: int | None) -> None:
    name = f"w{bits}a16" + ("" if group_size is None else f"g{group_size}")
    expected = Scheme(name=name, storage="packed_int", bits=bits, group_size=group_size, activation_bits=16)
    assert parse_scheme(name) == expected


def test_the_other_schemes() -> None:
    assert parse_scheme("w8a8") == Scheme(name="w8a8", storage="int8", bits=8, group_size=None, activation_bits=8)
    for name in ("bf16", "fp16"):
        assert parse_scheme(name) == Scheme(name=name, storage="dense", bits=16, group_size=None, activation_bits=16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w4",
        "w1a16",
        "w9a16",
        "w4a8",
        "w4a16g",
        "w4a16g16",
        "w4a16g0128",
        "w8a8g32",
        "W4A16",
        "w4a16-asym",
        "nf4",
        "w٤a16",
    ],
)
def test_anything_else_is_refused_with_what_is_known(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not known; choose one of bf16, fp16, w8a8, w\{2\.\.8\}a16"):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        # one 16-bit scale per group or row of 256, and 128 bits of shape per 512 x 256 weights of a packed linear
        ("bf16", 16.0),
        ("w8a8", 8 + 16 / 256),
        ("w4a16g128", 4 + 16 / 128 + 128 / (512 * 256)),
        ("w3a16", 3 + 16 / 256 + 128 / (512 * 256)),
    ],
)
def test_bits_per_weight_count_scales(scheme: str, bits: float) -> None:
    assert parse_scheme(scheme).bits_per_weight((512, 256)) == bits


def test_stored_bytes_are_of_what_is_in_the_layout() -> None:
    for name, dtype in itertools.product(("bf16", "w8a8", "w5a16g32"), (torch.bfloat16, torch.float32)):
        spec = parse_scheme(name).spec((7, 96))
        layout = spec.layout(dtype)
        assert spec.stored_bytes(dtype) == sum(math.prod(shape) * kind.itemsize for kind, shape in layout.values())


def test_a_group_must_divide_the_input() -> None:
    with pytest.raises(ValueError, match="w4a16g64: in_features 160 is not a multiple of group size 64"):
        parse_scheme("w4a16g64").spec((64, 160))
