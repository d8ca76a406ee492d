"""Every implementation there is, fastest first and the reference last."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from pressd.runtime.kernels.attention import cpu as attention_cpu
from pressd.runtime.kernels.attention import reference as attention_reference
from pressd.runtime.kernels.dense import cpu as dense_cpu
from pressd.runtime.kernels.dense import reference as dense_reference
from pressd.runtime.kernels.fp8 import reference as fp8_reference
from pressd.runtime.kernels.gate import reference as gate_reference
from pressd.runtime.kernels.int8 import cpu as int8_cpu
from pressd.runtime.kernels.int8 import reference as int8_reference
from pressd.runtime.kernels.mask import reference as mask_reference
from pressd.runtime.kernels.norm import reference as norm_reference
from pressd.runtime.kernels.packed_int import cpu as packed_int_cpu
from pressd.runtime.kernels.packed_int import cpu_bytes as packed_int_cpu_bytes
from pressd.runtime.kernels.packed_int import reference as packed_int_reference
from pressd.runtime.kernels.registry import REFERENCE, AttentionKernel, Device, LinearKernel, PointwiseKernels
from pressd.runtime.kernels.rotary import reference as rotary_reference
from pressd.runtime.kernels.triton_device import why_no_triton

LINEAR: tuple[LinearKernel, ...] = (
    dense_cpu.KERNEL,
    dense_reference.KERNEL,
    fp8_reference.KERNEL,
    int8_cpu.PREPACKED,
    int8_cpu.BYTES,
    int8_reference.KERNEL,
    mask_reference.KERNEL,
    packed_int_cpu_bytes.KERNEL,
    packed_int_cpu.KERNEL,
    packed_int_reference.KERNEL,
)
ATTENTION: tuple[AttentionKernel, ...] = (attention_cpu.KERNEL, attention_reference.KERNEL)
POINTWISE = PointwiseKernels(
    name=REFERENCE,
    why_not=lambda dtype, device: None,
    add_norm=norm_reference.add_norm,
    silu_mul=gate_reference.silu_mul,
    rotate_and_write=rotary_reference.rotate_and_write,
    selects_rotations=True,
)

# Code that is generated for the CPU wants LLVM, which there is no need for on a GPU or on other processors.
_GENERATED_LINEAR = ("int8.cpu_vnni", "packed_int.cpu_vnni")

# Loaded only where there is a GPU to run them: importing Triton takes half a second.
_TRITON_LINEAR = ("fp8", "int8", "packed_int")
_TRITON = (*_TRITON_LINEAR, "attention", "gate", "norm", "race", "rotary", "step", "gptq")


def triton_modules() -> tuple[ModuleType, ...]:
    """Return every module of Triton kernels; each has `variants()`."""
    return tuple(map(_triton, _TRITON))


def linear_kernels(device: Device) -> tuple[LinearKernel, ...]:
    """Return the candidates for linears on a device."""
    if device.kind != "cuda":
        return (*(_generated(name).KERNEL for name in _GENERATED_LINEAR), *LINEAR) if _has_llvm() else LINEAR
    return (*(_triton(storage).KERNEL for storage in _TRITON_LINEAR), *LINEAR)


def attention_kernels(device: Device) -> tuple[AttentionKernel, ...]:
    """Return the candidates for attention on a device."""
    if device.kind != "cuda":
        return (_generated("attention.cpu_generated").KERNEL, *ATTENTION) if _has_llvm() else ATTENTION
    return _triton("attention").KERNEL, *ATTENTION


def pointwise_kernels(device: Device) -> tuple[PointwiseKernels, ...]:
    """Return the candidates for what lies between the linears on a device."""
    if device.kind != "cuda":
        return (_generated_pointwise(), POINTWISE) if _has_llvm() else (POINTWISE,)
    fused = PointwiseKernels(
        name="triton",
        why_not=why_no_triton,
        add_norm=_triton("norm").add_norm,
        silu_mul=_triton("gate").silu_mul,
        rotate_and_write=_triton("rotary").rotate_and_write,
        selects_rotations=False,
    )
    return fused, POINTWISE


def race_kernel() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return what draws tokens where nothing filters them, on a GPU."""
    found: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = _triton(
        "race"
    ).draw
    return found


def step_kernel() -> ModuleType:
    """Return what prepares steps where attention reads block tables on the device."""
    return _triton("step")


def use_code_cache(directory: Path | None) -> None:
    """Keep generated code in this directory from now on; None: nowhere."""
    if _has_llvm():
        _generated("codegen.object_cache").use(directory)


def _generated_pointwise() -> PointwiseKernels:
    return PointwiseKernels(
        name="cpu-generated",
        why_not=_generated("vnni_linear").why_not_pointwise,
        add_norm=_generated("norm.cpu").add_norm,
        silu_mul=_generated("gate.cpu").silu_mul,
        rotate_and_write=_generated("rotary.cpu").rotate_and_write,
        selects_rotations=False,
        is_generated=True,
    )


def _has_llvm() -> bool:
    return find_spec("llvmlite") is not None


def _generated(module: str) -> ModuleType:
    return import_module(f"pressd.runtime.kernels.{module}")


def _triton(folder: str) -> ModuleType:
    return import_module(f"pressd.runtime.kernels.{folder}.triton")
