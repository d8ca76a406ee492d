"""Where Triton kernels run: NVIDIA GPUs from compute capability 8.0 on, in 16-bit types."""

import torch

from pressd.runtime.kernels.registry import Device

DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)


def capability(device: Device) -> tuple[int, int] | None:
    """Return the compute capability of a GPU, None of what is none."""
    for feature in device.features:
        if feature.startswith("sm_"):
            digits = feature.removeprefix("sm_")
            return int(digits[:-1]), int(digits[-1])
    return None


def why_no_triton(dtype: torch.dtype, device: Device) -> str | None:
    """Return why no Triton kernel runs there in this type, None if one may."""
    if device.kind != "cuda":
        return f"runs on NVIDIA GPUs only, not on {device.kind}"
    found = capability(device)
    if found is None or found < OLDEST:
        what = "an unknown one" if found is None else ".".join(map(str, found))
        return f"needs compute capability {'.'.join(map(str, OLDEST))}; this device has {what}"
    if dtype not in DTYPES:
        return f"serves 16-bit types, not {str(dtype).removeprefix('torch.')}"
    return None
