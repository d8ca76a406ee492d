"""Says a plan in config.json's words, so that transformers and vLLM load the artifact unchanged.

compressed-tensors' `quantization_config`: one config group per scheme, linears that stay dense in `ignore`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from pressd.compress.plan import GroupPlan, Plan
from pressd.runtime.artifact.families import LM_HEAD, ModelMap
from pressd.runtime.artifact.quantization import FORMATS, MIXED
from pressd.runtime.artifact.schemes import LinearSpec


def artifact_config(source: dict[str, object], plan: Plan) -> dict[str, object]:
    """Return config.json of the artifact: the source's, with its precision and how its linears are stored."""
    key = "torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype"
    config = source | {key: str(plan.dtype).removeprefix("torch.")}
    pressed: dict[str, list[GroupPlan]] = defaultdict(list)
    for group in plan.groups():
        if group.is_pressed:
            pressed[group.scheme].append(group)
    if pressed:
        config["quantization_config"] = _quantization_config(plan, pressed)
    return config


def requirements(plan: Plan) -> dict[str, str]:
    """Return the oldest versions of other tools that read this artifact."""
    bits = {spec.bits for group in plan.groups() if group.is_pressed for spec in group.specs.values()}
    if not bits:
        return {}
    # Until 0.17 the widths that do not divide 32 were stored otherwise, under the same name.
    return {"compressed-tensors": ">=0.18" if bits - {2, 4, 8} else ">=0.15"}


def _quantization_config(plan: Plan, pressed: dict[str, list[GroupPlan]]) -> dict[str, object]:
    dense = [
        name
        for group in plan.groups()
        if not group.is_pressed
        for name in group.specs
        if name.startswith("model.layers.")
    ]
    everywhere = len(pressed) == 1 and not dense
    groups = {
        f"group_{index}": _config_group(members, ["Linear"] if everywhere else _patterns(plan.model, members))
        for index, members in enumerate(pressed.values())
    }
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        # A tied model has a module of this name too, though no tensor.
        "ignore": [LM_HEAD, *_name_patterns(plan.model, dense)],
    }


def _config_group(groups: list[GroupPlan], targets: list[str]) -> dict[str, object]:
    spec = next(iter(groups[0].specs.values()))
    return {
        "targets": targets,
        "format": FORMATS[spec.storage],
        "weights": _weights(spec),
        "input_activations": _int8_per_token() if spec.activation_bits == 8 else None,
        "output_activations": None,
    }


def _weights(spec: LinearSpec) -> dict[str, object]:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }


def _int8_per_token() -> dict[str, object]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _patterns(model: ModelMap, groups: list[GroupPlan]) -> list[str]:
    return _name_patterns(model, [name for group in groups for name in group.specs])


def _name_patterns(model: ModelMap, names: Iterable[str]) -> list[str]:
    """Return few `re:` targets that match exactly these linears of the decoder's layers.

    Linears that are meant in the same layers share a pattern.
    """
    layers_of: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layer, _, role = name.removeprefix("model.layers.").partition(".")
        layers_of[role].append(layer)
    roles_of: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for role, numbers_of_role in layers_of.items():
        roles_of[tuple(numbers_of_role)].append(re.escape(role))
    num_layers = sum(block.name.startswith("layers.") for block in model.blocks)
    patterns = []
    for layers, alternatives in roles_of.items():
        numbers = r"\d+" if len(layers) == num_layers else f"({'|'.join(layers)})"
        patterns.append(rf"re:model\.layers\.{numbers}\.({'|'.join(alternatives)})$")
    return patterns
