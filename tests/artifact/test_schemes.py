"""The grammar of schemes, and what each costs."""

import itertools
import math

import pytest
import torch

from pressd.runtime.artifact.schemes import Scheme, parse_scheme


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_integer_schemes(bits: int, activation_bits: int, group_size: int | None) -> None:
    name = f"w{bits}a{activation_bits}" + ("" if group_size is None else f"g{group_size}")
    storage = "int8" if name == "w8a8" else "packed_int"
    expected = Scheme(name=name, storage=storage, bits=bits, group_size=group_size, activation_bits=activation_bits)
    assert parse_scheme(name) == expected


def test_the_other_schemes() -> None:
    for name in ("bf16", "fp16"):
        assert parse_scheme(name) == Scheme(name=name, storage="dense", bits=16, group_size=None, activation_bits=16)
    sparse = parse_scheme("sparse24:w4a16g32+residual8")
    assert (sparse.sparse24, sparse.rank, sparse.residual_rank) == (True, None, 8)
    assert (sparse.storage, sparse.bits, sparse.group_size) == ("packed_int", 4, 32)
    thin = parse_scheme("lowrank16:bf16")
    assert (thin.sparse24, thin.rank, thin.residual_rank) == (False, 16, None)
    assert [parse_scheme(name).cast for name in ("lowrank16:bf16", "sparse24:fp16", "w4a16+residual2")] == [
        torch.bfloat16,
        torch.float16,
        None,
    ]
    assert [parse_scheme(name).is_dense for name in ("bf16", "lowrank16:bf16", "w8a8")] == [True, False, False]
    assert [parse_scheme(name).is_plain for name in ("bf16", "sparse24:bf16", "w8a8", "w8a8+residual1")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w4",
        "w1a16",
        "w9a16",
        "w4a4",
        "w4a16g",
        "w4a16g16",
        "w4a16g0128",
        "W4A16",
        "w4a16-sym",
        "w4a16-asym-asym",
        "w4a16g-asym",
        "w4a16-asymg32",
        "fp8a16-block",
        "fp8a16-static",
        "fp8-asym",
        "bf16-static",
        "nf4",
        "w٤a16",
        "sparse:w4a16",
        "sparse24:",
        "sparse24:lowrank4:bf16",
        "lowrank:bf16",
        "lowrank0:bf16",
        "lowrank04:bf16",
        "lowrank100000:bf16",
        "w4a16+residual",
        "w4a16+residual4+residual4",
        "w4a16 ",
    ],
)
def test_anything_else_is_refused_with_what_is_known(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not known; choose one of bf16, fp16, fp8, fp8a16, w8a8, w\{2\.\.8\}a\{16\|8\}"
    ) as caught:
        parse_scheme(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16+residual4", "bf16 loses nothing that a residual could correct; write bf16"),
        ("sparse24:w8a8", "sparse24 weights meet 16-bit activations only; write a16"),
        ("w4a8-asym", "zero points meet 16-bit activations only; write a16, or leave out -asym"),
        ("w8a8-asym", "zero points meet 16-bit activations only"),
        ("w4a8g32-static", "activations of one scale meet 8-bit weights of one per row; write w8a8-static"),
        ("w8a16-static", "activations of one scale meet 8-bit weights of one per row"),
        ("lowrank8:w8a8-static", "each factor would need a scale of its own; leave out lowrank or -static"),
        ("lowrank8:fp8-static", "each factor would need a scale of its own"),
        ("sparse24:fp8-block", "sparse24 weights meet 16-bit activations only"),
    ],
)
def test_what_would_make_no_sense_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        # one 16-bit scale per group or row of 256, and 128 bits of shape per 512 x 256 weights of a packed linear
        ("bf16", 16.0),
        ("w8a8", 8 + 16 / 256),
        ("w4a16g128", 4 + 16 / 128 + 128 / (512 * 256)),
        ("w3a16", 3 + 16 / 256 + 128 / (512 * 256)),
        ("w3a16g32-asym", 3 + (16 + 3) / 32 + 128 / (512 * 256)),
        ("fp8-block", 8 + 16 / (128 * 128)),
        ("fp8-static", 8 + 16 / 256 + 16 / (512 * 256)),
        ("w8a8-static", 8 + 16 / 256 + 16 / (512 * 256)),
        ("w4a8g32", 4 + 16 / 32 + 128 / (512 * 256)),
        # half of the weights, a bit for each to say which; and their scales, one per 32 that are stored
        ("sparse24:w4a16g32", (4 + 16 / 32) / 2 + 1 + 128 / (512 * 256)),
        ("lowrank64:bf16", 16 * 64 * (512 + 256) / (512 * 256)),
        ("w4a16g128+residual8", 4 + 16 / 128 + (128 + 16 * 8 * (512 + 256)) / (512 * 256)),
    ],
)
def test_bits_per_weight_count_scales(scheme: str, bits: float) -> None:
    assert parse_scheme(scheme).bits_per_weight((512, 256)) == bits


def test_stored_bytes_are_of_what_is_in_the_layout() -> None:
    for name, dtype in itertools.product(
        ("bf16", "w8a8", "w5a16g32", "sparse24:w8a16+residual3", "lowrank2:w4a8"), (torch.bfloat16, torch.float32)
    ):
        spec = parse_scheme(name).spec((7, 96))
        layout = spec.layout(dtype)
        assert spec.stored_bytes(dtype) == sum(math.prod(shape) * kind.itemsize for kind, shape in layout.values())


def test_a_suffix_says_what_is_special() -> None:
    special = {}
    for name in ("w4a16g32-asym", "w8a16-asym", "fp8-block", "fp8-static", "w8a8-static", "sparse24:w4a16-asym"):
        scheme = parse_scheme(name)
        special[name] = (scheme.storage, scheme.symmetric, scheme.block_size, scheme.static_activations)
        for _, leaf in scheme.spec((48, 256)).leaves():
            assert (leaf.storage, leaf.symmetric, leaf.block_size, leaf.static_activations) == special[name]
    assert special == {
        "w4a16g32-asym": ("packed_int", False, None, False),
        "w8a16-asym": ("packed_int", False, None, False),
        "fp8-block": ("fp8", True, 128, False),
        "fp8-static": ("fp8", True, None, True),
        "w8a8-static": ("int8", True, None, True),
        "sparse24:w4a16-asym": ("packed_int", False, None, False),
    }
    assert parse_scheme("w4a16-asym+residual4").residual_rank == 4


def test_blocks_must_divide_the_input_and_not_the_output() -> None:
    with pytest.raises(ValueError, match="fp8-block: in_features 160 is not a multiple of 128, the columns of a block"):
        parse_scheme("fp8-block").spec((64, 160))
    layout = parse_scheme("fp8-block").spec((130, 256)).layout(torch.bfloat16)
    assert layout["weight_scale"] == (torch.bfloat16, (2, 2))


def test_a_group_must_divide_the_input() -> None:
    with pytest.raises(ValueError, match="w4a16g64: in_features 160 is not a multiple of group size 64"):
        parse_scheme("w4a16g64").spec((64, 160))
