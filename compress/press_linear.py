"""Presses one weight into the tensors of its spec, from the outermost node to the leaves."""

from typing import assert_never

import torch
from torch import Tensor

from pressd.compress.encoding import Codes, decode, encode, whole
from pressd.compress.passes.magnitude import keep_two_of_four
from pressd.compress.passes.rtn import round_to_nearest
from pressd.compress.passes.svd import factorise, one_thread
from pressd.compress.rows import squared_norms
from pressd.runtime.artifact.specs import Chain, LinearSpec, Masked, Packed, Sum, child_tensors
from pressd.runtime.kernels.mask import format as mask


def press_linear(
    original: Tensor, weight: Tensor, spec: LinearSpec, *, input_scale: Tensor | None = None
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Return the tensors to store for `weight` [out, in], and the squared norms of what was lost and of the weight.

    `weight` is `original` in the artifact's precision; the loss is measured against the latter. `input_scale` [1], in
    that precision, is what static activations are rounded by; raises ValueError where it is needed and missing.
    """
    if input_scale is None and any(leaf.static_activations for _, leaf in spec.leaves()):
        raise ValueError(
            "the scale of static activations is measured on text, which rounding to nearest does not read; calibrate "
            "with a pass that does, or choose a scheme without -static"
        )
    if isinstance(spec, Packed):
        if spec.is_dense:
            return {"weight": weight}, squared_norms(original, lambda rows, wide: weight[rows].to(wide))
        rounded = round_to_nearest(weight, spec)
        norms = squared_norms(original, lambda rows, wide: rounded.decoded(rows, spec, wide))
        return _stored(rounded, spec, input_scale), norms
    tensors = _press(weight, spec, input_scale)
    decoded = decode(tensors, spec, torch.promote_types(weight.dtype, torch.float32))
    return tensors, squared_norms(original, lambda rows, wide: decoded[rows].to(wide))


def _stored(rounded: Codes, spec: Packed, input_scale: Tensor | None) -> dict[str, Tensor]:
    return encode(
        rounded.codes,
        rounded.scale,
        spec,
        zero_point=rounded.zero_point,
        input_scale=input_scale if spec.static_activations else None,
    )


def _press(weight: Tensor, spec: LinearSpec, input_scale: Tensor | None) -> dict[str, Tensor]:
    match spec:
        case Packed():
            return {"weight": weight} if spec.is_dense else _stored(round_to_nearest(weight, spec), spec, input_scale)
        case Masked():
            kept = keep_two_of_four(weight)
            values = _press(mask.compact(weight, kept), spec.values, None)
            return whole(values, "values") | {"mask": mask.pack(kept)}
        case Chain():
            a, b = (factor.to(weight.dtype) for factor in factorise(weight, spec.rank))
            return whole(_press(a, spec.a, None), "a") | whole(_press(b, spec.b, None), "b")
        case Sum():
            tensors = whole(_press(weight, spec.base, input_scale), "base")
            wide = torch.promote_types(weight.dtype, torch.float32)
            with one_thread():  # a chain's product is a sum
                lost = weight.to(wide) - decode(child_tensors(tensors, "base"), spec.base, wide)
            a, b = (factor.to(weight.dtype) for factor in factorise(lost, spec.residual.rank))
            return tensors | whole({"a.weight": a, "b.weight": b}, "residual")
        case _:
            assert_never(spec)
