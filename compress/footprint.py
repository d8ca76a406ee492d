"""What a model takes per token and to be moved, from headers alone.

Multiplications and additions count one each: a weight that is used costs two per token. Norms, rotations and softmax
are left out (they grow with the hidden size, not with its square), and so is the embedding, which is looked up.
"""

import math
from dataclasses import dataclass

from pressd.compress.companions import companions
from pressd.runtime.artifact.directory import INDEX
from pressd.runtime.artifact.families import EMBED, EMBED_PREFIX, LM_HEAD
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.specs import Chain, LinearSpec, Masked, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """One model at a stated `context`, the number of positions that the new token sees (fewer behind a window).

    `flops_per_token` counts every weight of the dense shapes, `effective_flops_per_token` those that are multiplied:
    half of a 2:4 mask, the factors of a low rank; both hold `attention_flops_per_token`. `kv_bytes_per_token` is in the
    model's own precision (a server may keep fewer bits). `read_bytes_per_token` are the stored weights that one decoded
    token reads when it is alone in its batch. `transfer_bytes` are all files that must be copied to serve it.
    """

    context: int
    flops_per_token: int
    effective_flops_per_token: int
    attention_flops_per_token: int
    kv_bytes_per_token: int
    read_bytes_per_token: int
    transfer_bytes: int


def footprint(checkpoint: Checkpoint, context: int) -> Footprint:
    """Return the footprint of a model directory; no weights are read."""
    shape, dtype = checkpoint.model.attention, checkpoint.torch_dtype
    prefixes = [member.prefix for group in checkpoint.model.groups() if group.name != EMBED for member in group.members]
    if checkpoint.model.tied:
        prefixes.append(LM_HEAD)
    specs = [checkpoint.linear(prefix) for prefix in prefixes]
    seen = sum(min(context, window or context) for window in shape.windows)
    attention = 4 * seen * shape.num_heads * shape.head_dim
    embedding = checkpoint.linear(EMBED_PREFIX)
    others = sum(math.prod(shape) for shape in checkpoint.model.others().values()) * dtype.itemsize
    read = sum(spec.stored_bytes(dtype) for spec in specs) + others
    return Footprint(
        context=context,
        flops_per_token=2 * sum(spec.out_features * spec.in_features for spec in specs) + attention,
        effective_flops_per_token=2 * sum(used_weights(spec) for spec in specs) + attention,
        attention_flops_per_token=attention,
        kv_bytes_per_token=2 * len(shape.windows) * shape.num_kv_heads * shape.head_dim * dtype.itemsize,
        read_bytes_per_token=read + embedding.stored_bytes(dtype) // embedding.out_features,
        transfer_bytes=_transfer_bytes(checkpoint),
    )


def used_weights(spec: LinearSpec) -> int:
    """Return how many weights a row of activations is multiplied with."""
    if isinstance(spec, Packed):
        return spec.out_features * spec.in_features
    if isinstance(spec, Masked):
        return used_weights(spec.values)
    if isinstance(spec, Chain):
        return used_weights(spec.a) + used_weights(spec.b)
    return used_weights(spec.base) + used_weights(spec.residual)


def _transfer_bytes(checkpoint: Checkpoint) -> int:
    """The manifest's files; of a directory without one the weights, config.json, index, and what belongs to them."""
    if checkpoint.manifest is not None:
        return sum(file.bytes for file in checkpoint.manifest.files.values())
    names = {*checkpoint.weight_files, "config.json", *companions(checkpoint.path)}
    if (checkpoint.path / INDEX).is_file():
        names.add(INDEX)
    return sum((checkpoint.path / name).stat().st_size for name in names)
