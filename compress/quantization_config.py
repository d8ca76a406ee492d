"""Says a plan in config.json's words, so that transformers and vLLM load the artifact unchanged, or refuse it.

compressed-tensors' `quantization_config` where it has the words: one config group per scheme, linears that stay dense
in `ignore`. Otherwise our own (runtime/artifact/own_config.py).
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch

from pressd.compress.group_plan import GroupPlan
from pressd.compress.plan import Plan
from pressd.runtime.artifact.families import EMBED, LM_HEAD, ModelMap
from pressd.runtime.artifact.kv_scales import KEY as KV_KEY
from pressd.runtime.artifact.own_config import hide
from pressd.runtime.artifact.quantization import FORMATS, MIXED
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8

# What compressed-tensors calls an artifact in which nothing but keys and values has scales.
DENSE = "dense"


def with_precision(config: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Return `config` saying that dense weights are in `dtype`, under the key that it already uses."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return config | {key: str(dtype).removeprefix("torch.")}


def artifact_config(source: dict[str, object], plan: Plan) -> dict[str, object]:
    """Return config.json of the artifact: the source's, with its precision and how its linears are stored.

    The scales of keys and values that a plan has are said as well.
    """
    config = with_precision(source, plan.dtype)
    if plan.unties:
        config["tie_word_embeddings"] = False
    if needs_own_format(plan):
        schemes = {group.group.name: group.scheme for group in plan.groups() if group.is_pressed}
        return hide(config, schemes, plan.kv_scheme)
    pressed: dict[str, list[GroupPlan]] = defaultdict(list)
    for group in plan.groups():
        if group.is_pressed:
            pressed[group.scheme].append(group)
    if pressed or plan.kv_scheme is not None:
        config["quantization_config"] = _quantization_config(plan, pressed)
    return config


def needs_own_format(plan: Plan) -> bool:
    """Whether other tools have no words for something in the plan.

    Low rank, masks and sums. And pressed embeddings: compressed-tensors 0.20 can describe one, but transformers 5.24
    fails at the first forward, and initialises a tied head at random. And zero points beside another scheme: it reads
    them only with `dequantize=True`, which decodes everything by the first scheme it finds.
    """
    pressed = [group for group in plan.groups() if group.is_pressed]
    if _has_zero_points(pressed) and len({group.scheme for group in pressed}) > 1:
        return True
    return any(
        group.group.name == EMBED or not isinstance(spec, Packed) for group in pressed for spec in group.specs.values()
    )


def _has_zero_points(groups: Iterable[GroupPlan]) -> bool:
    return any(not leaf.symmetric for group in groups for spec in group.specs.values() for _, leaf in spec.leaves())


def readers(plan: Plan) -> dict[str, str]:
    """Return which tools load the artifact; only what has been loaded there is called native."""
    if needs_own_format(plan):
        return {
            "pressd": "native",
            "transformers": "refuses; convert it to dense",
            "vllm": "refuses; convert it to dense",
        }
    # Left to decompress at the first forward, transformers 5.24 asks for zero points in another shape.
    transformers = "with CompressedTensorsConfig(dequantize=True)" if _has_zero_points(plan.groups()) else "native"
    return {"pressd": "native", "transformers": transformers, "vllm": "layout-checked"}


def requirements(plan: Plan) -> dict[str, str]:
    """Return the oldest versions of other tools that read this artifact."""
    leaves = (leaf for group in plan.groups() for spec in group.specs.values() for _, leaf in spec.leaves())
    bits = {leaf.bits for leaf in leaves if not leaf.is_dense}
    if not bits or needs_own_format(plan):
        return {}
    # Until 0.17 the widths that do not divide 32 were stored otherwise, under the same name.
    return {"compressed-tensors": ">=0.18" if bits - {2, 4, 8} else ">=0.15"}


def _quantization_config(plan: Plan, pressed: dict[str, list[GroupPlan]]) -> dict[str, object]:
    dense = [
        name for group in plan.groups() if not group.is_pressed and group.group.name != EMBED for name in group.specs
    ]
    if plan.model.tied:
        dense.append(LM_HEAD)  # there is a module of this name, though no tensor
    everywhere = len(pressed) == 1 and set(dense) <= {LM_HEAD}
    groups = {
        f"group_{index}": _config_group(members, ["Linear"] if everywhere else _patterns(plan.model, members))
        for index, members in enumerate(pressed.values())
    }
    formats = {str(group["format"]) for group in groups.values()} or {DENSE}
    kv_words = {} if plan.kv_scheme is None else {KV_KEY: plan.kv_scheme.to_config()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _name_patterns(plan.model, dense),
        **kv_words,
    }


def _config_group(groups: list[GroupPlan], targets: list[str]) -> dict[str, object]:
    spec = next(iter(groups[0].specs.values()))
    assert isinstance(spec, Packed)
    return {
        "targets": targets,
        "format": FORMATS[spec.storage],
        "weights": _weights(spec),
        "input_activations": _activations(spec) if spec.activation_bits == 8 else None,
        "output_activations": None,
    }


def _weights(spec: Packed) -> dict[str, object]:
    strategy = "channel" if spec.group_size is None else "group"
    block: dict[str, object] = {"strategy": "block", "block_structure": [spec.block_size, spec.block_size]}
    return {
        "num_bits": spec.bits,
        "type": _kind(spec),
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.group_size,
        "dynamic": False,
    } | ({} if spec.block_size is None else block)


def _activations(spec: Packed) -> dict[str, object]:
    columns = spec.group_size or spec.block_size
    grouping: dict[str, object] = {"strategy": "token" if columns is None else "group"}
    grouping |= {} if columns is None else {"group_size": columns}
    if spec.static_activations:
        grouping = {"strategy": "tensor"}
    return {"num_bits": 8, "type": _kind(spec), "symmetric": True, "dynamic": not spec.static_activations} | grouping


def _kind(spec: Packed) -> str:
    return "float" if spec.storage == fp8.NAME else "int"


def _patterns(model: ModelMap, groups: list[GroupPlan]) -> list[str]:
    return _name_patterns(model, [name for group in groups for name in group.specs])


def _name_patterns(model: ModelMap, names: Iterable[str]) -> list[str]:
    """Return few targets that match exactly these linears.

    Those of the decoder's layers are `re:` patterns; linears that are meant in the same layers share one.
    """
    layers_of: dict[str, list[str]] = defaultdict(list)
    patterns: list[str] = []
    for name in names:
        if not name.startswith("model.layers."):
            patterns.append(name)
            continue
        layer, _, role = name.removeprefix("model.layers.").partition(".")
        layers_of[role].append(layer)
    roles_of: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for role, numbers_of_role in layers_of.items():
        roles_of[tuple(numbers_of_role)].append(re.escape(role))
    num_layers = sum(block.name.startswith("layers.") for block in model.blocks)
    for layers, alternatives in roles_of.items():
        numbers = r"\d+" if len(layers) == num_layers else f"({'|'.join(layers)})"
        patterns.append(rf"re:model\.layers\.{numbers}\.({'|'.join(alternatives)})$")
    return patterns
