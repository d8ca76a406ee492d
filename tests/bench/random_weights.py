"""A checkpoint that is in no file: random weights of any shape and scheme, made where they are wanted.

A model of many gigabytes can so be measured on a machine that it could not be copied to. Weights spread over all
their codes, and products keep the size of their inputs, so that no kernel meets zeros, infinities or NaN.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from pressd.runtime.artifact.families import describe
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed

# Two of every four columns, whichever: the lowest bit is the first column.
TWO_OF_FOUR = 0b0011_0011


class RandomCheckpoint:
    """Stands in for runtime.artifact.reader.Checkpoint; draws from torch's generator of `device` at every call.

    `scheme` is that of all linears in the blocks; embedding and lm_head are dense in `dtype`, or in it as well.
    """

    def __init__(
        self, config: dict[str, Any], scheme: str, *, device: torch.device, dtype: torch.dtype, whole: bool = False
    ) -> None:
        self.path = Path("in no file")
        self.config = config
        self.model = describe(config)
        self.torch_dtype = dtype
        self.kv_scheme = None
        self.device = device
        pressed = parse_scheme(scheme)
        blocks = {member.prefix for group in self.model.groups() if "layers." in group.name for member in group.members}
        self._specs = {
            linear.prefix: pressed.spec(linear.shape)
            if whole or linear.prefix in blocks
            else Packed.dense(linear.shape, dtype)
            for linear in self.model.linears()
        }

    @property
    def artifact_id(self) -> str:
        return hashlib.sha256(json.dumps([self.config, str(self._specs)], sort_keys=True).encode()).hexdigest()

    @property
    def dense_bytes(self) -> int:
        return self.model.num_params * self.torch_dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that an artifact of this scheme has."""
        dense = sum(math.prod(shape) for shape in self.model.others().values()) * self.torch_dtype.itemsize
        return dense + sum(spec.stored_bytes(self.torch_dtype) for spec in self._specs.values())

    def linear(self, prefix: str) -> Any:
        return self._specs[prefix]

    def linear_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        spec = self._specs[prefix]
        tensors = {}
        for leaf_prefix, leaf in spec.leaves():
            for suffix, (dtype, shape) in leaf.layout(self.torch_dtype).items():
                tensors[leaf_prefix + suffix] = self._draw(suffix, dtype, shape, leaf)
        for suffix, (dtype, shape) in spec.layout(self.torch_dtype).items():
            if suffix not in tensors:
                assert suffix.endswith("mask"), suffix
                tensors[suffix] = torch.full(shape, TWO_OF_FOUR, dtype=dtype, device=self.device)
        return tensors

    def tensor(self, name: str) -> torch.Tensor:
        prefix, _, suffix = name.rpartition(".")
        if prefix in self._specs and suffix != "bias":
            return self.linear_tensors(prefix)[suffix]
        return torch.rand(self.model.others()[name], device=self.device).add_(0.5).to(self.torch_dtype)

    def _draw(self, suffix: str, dtype: torch.dtype, shape: tuple[int, ...], leaf: Any) -> torch.Tensor:
        if suffix == "weight_shape":
            return torch.tensor([leaf.out_features, leaf.in_features])
        if not dtype.is_floating_point:
            limits = torch.iinfo(dtype)
            return torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, device=self.device)
        if suffix == "weight" and dtype == torch.float8_e4m3fn:
            return torch.randn(shape, device=self.device).mul_(100).clamp_(-448, 448).to(dtype)
        if suffix == "weight":
            return torch.randn(shape, dtype=dtype, device=self.device).mul_(leaf.in_features**-0.5)
        if leaf.storage == "fp8":
            return torch.rand(shape, device=self.device).add_(0.5).mul_(leaf.in_features**-0.5 / 100).to(dtype)
        # Uniform codes spread over 2^bits / sqrt(12) around zero.
        scale = (12 / leaf.in_features) ** 0.5 / 2**leaf.bits
        return torch.rand(shape, device=self.device).add_(0.5).mul_(scale).to(dtype)
