"""The tree that says how a linear is stored: what its nodes are made of, and under which names."""

import torch

from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Chain, Masked, Packed, Sum


def test_a_tree_names_every_tensor_by_its_path() -> None:
    layout = parse_scheme("sparse24:w4a16g32+residual8").spec((48, 128)).layout(torch.bfloat16)
    assert layout == {
        "base.mask": (torch.uint8, (48, 16)),
        "base.values.weight_packed": (torch.int32, (48, 8)),
        "base.values.weight_scale": (torch.bfloat16, (48, 2)),
        "base.values.weight_shape": (torch.int64, (2,)),
        "residual.a.weight": (torch.bfloat16, (48, 8)),
        "residual.b.weight": (torch.bfloat16, (8, 128)),
    }
    chain = parse_scheme("lowrank32:w8a8").spec((48, 128))
    assert chain.layout(torch.float16) == {
        "a.weight": (torch.int8, (48, 32)),
        "a.weight_scale": (torch.float16, (48, 1)),
        "b.weight": (torch.int8, (32, 128)),
        "b.weight_scale": (torch.float16, (32, 1)),
    }


def test_every_node_knows_its_shape_and_its_leaves() -> None:
    for name, kind, prefixes in (
        ("w4a16", Packed, [""]),
        ("sparse24:bf16", Masked, ["values."]),
        ("lowrank4:w8a16", Chain, ["a.", "b."]),
        ("lowrank4:w8a16+residual2", Sum, ["base.a.", "base.b.", "residual.a.", "residual.b."]),
        ("sparse24:w4a16+residual2", Sum, ["base.values.", "residual.a.", "residual.b."]),
    ):
        spec = parse_scheme(name).spec((20, 36))
        assert isinstance(spec, kind)
        assert (spec.out_features, spec.in_features) == (20, 36)
        assert [prefix for prefix, _ in spec.leaves()] == prefixes
        for prefix, leaf in spec.leaves():
            assert {f"{prefix}{suffix}" for suffix in leaf.layout(torch.float32)} <= spec.layout(torch.float32).keys()
        assert not spec.is_dense
    assert parse_scheme("bf16").spec((20, 36)).is_dense
