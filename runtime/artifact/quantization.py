"""config.json's `quantization_config`, in compressed-tensors' words or our own: which scheme each linear is stored in.

Only what the kernels compute exactly is accepted; a key that would change the numbers and is not known here is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.families import EMBED, EMBED_PREFIX, ModelMap
from pressd.runtime.artifact.own_config import MODEL_TYPE
from pressd.runtime.artifact.schemes import BLOCK_SIZE, GROUP_SIZES, Scheme, parse_scheme

FORMATS = {"packed_int": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
# What compressed-tensors calls 8-bit floats that meet activations in 16 bits; they are stored in the same way.
NAIVE = ("naive-quantized", "fp8")
MIXED = "mixed-precision"
_MAX_PATTERN = 4096
_NAME_CHARACTERS = 64
_MAX_WORK = 1e6
_MAX_WORK_IN_ALL = 2e9  # some tens of seconds at worst; real files stay far below
# Keys of compressed-tensors that change nothing about how a finished checkpoint is decoded.
_INERT = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
# Orders of quantisation after which the columns are in their natural order again.
_NATURAL_ORDER = (None, "weight", "static")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSchemes:
    """The scheme of each linear by its name; `targets` come in the order of their precedence."""

    targets: tuple[tuple[str, Scheme], ...]
    ignore: tuple[str, ...]

    def scheme_of(self, linear: str) -> Scheme | None:
        """Return the scheme of the linear called `linear`, None if it is dense.

        Exact names win over patterns, patterns over the class name `Linear` (compressed-tensors, `match_targets`),
        which the embedding is not.
        """
        if linear == EMBED_PREFIX:
            return next((scheme for target, scheme in self.targets if target == linear), None)
        if any(_matches(linear, target) for target in self.ignore):
            return None
        return next((scheme for target, scheme in self.targets if _matches(linear, target)), None)


def read_quantization(config: Mapping[str, object], model: ModelMap) -> StoredSchemes:
    """Return what `quantization_config` says (without one: all dense); raises ArtifactError for the unknown."""
    raw = config.get("quantization_config")
    if raw is None:
        return StoredSchemes(targets=(), ignore=())
    where = "config.json: quantization_config"
    fields = _object(raw, where)
    if fields.get("quant_method") == MODEL_TYPE:
        return _own_schemes(_object(fields.get("schemes"), f"{where}.schemes"), f"{where}.schemes", model)
    if fields.get("quant_method") != "compressed-tensors":
        method = fields.get("quant_method")
        raise ArtifactError(f"{where}: quant_method {method!r} is not known; known: compressed-tensors, {MODEL_TYPE}")
    if fields.get("quantization_status") != "compressed":
        status = fields.get("quantization_status")
        raise ArtifactError(f"{where}: quantization_status is {status!r}; only compressed weights are read")
    for key in ("transform_config", "sparsity_config", "moe_sparsity_config"):
        if fields.get(key) and fields[key] != {"format": "dense"}:
            raise ArtifactError(f"{where}: {key} is not supported; serve a checkpoint without it")
    targets: list[tuple[str, Scheme]] = []
    for name, group in _object(fields.get("config_groups"), f"{where}.config_groups").items():
        at = f"{where}.config_groups.{name}"
        content = _object(group, at)
        scheme = _scheme(content, fields.get("format"), at)
        targets += [(target, scheme) for target in _targets(content.get("targets"), f"{at}.targets")]
    ignore = _targets(fields.get("ignore") or [], f"{where}.ignore")
    _check_work([*(target for target, _ in targets), *ignore], model, where)
    by_rank = sorted(targets, key=lambda item: (item[0] == "Linear", "re:" in item[0], item[0]))
    return StoredSchemes(targets=tuple(by_rank), ignore=ignore)


def _check_work(names: list[str], model: ModelMap, where: str) -> None:
    """Every linear meets every name: refuse a file that would keep a reader busy with that alone."""
    each = sum(_check_pattern(name.removeprefix("re:"), where) if name.startswith("re:") else 1 for name in names)
    if each * sum(1 for _ in model.linears()) > _MAX_WORK_IN_ALL:
        raise ArtifactError(f"{where}: {len(names)} targets and names to ignore are too many, or too complicated")


def _own_schemes(schemes: dict[str, object], at: str, model: ModelMap) -> StoredSchemes:
    """Schemes by fused group, as our own artifacts say it where compressed-tensors has no words."""
    groups = {group.name: group for group in model.groups()}
    targets: list[tuple[str, Scheme]] = []
    for name, text in schemes.items():
        if name not in groups or not isinstance(text, str):
            raise ArtifactError(f"{at}: {name!r}: {text!r} is not a scheme of a fused group of this model")
        try:
            scheme = parse_scheme(text)
            check_group(name, scheme)
        except ValueError as error:
            raise ArtifactError(f"{at}: {name}: {error}") from None
        targets += [(member.prefix, scheme) for member in groups[name].members]
    return StoredSchemes(targets=tuple(targets), ignore=())


def check_group(group: str, scheme: Scheme) -> None:
    """Refuse a scheme that a fused group of this name cannot have; raises ValueError with the way out."""
    if group == EMBED and (not scheme.is_plain or scheme.activation_bits != 16):
        raise ValueError(
            f"{scheme.name}: rows of an embedding are looked up, not multiplied; choose w8a16 or another a16"
        )


def _scheme(group: dict[str, object], outer_format: object, at: str) -> Scheme:
    weights = _object(group.get("weights"), f"{at}.weights")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if type(bits) is not int:
        raise ArtifactError(f"{at}.weights: num_bits is {bits!r}; it must be an integer")
    if not _is_plain(weights) or group.get("output_activations"):
        raise ArtifactError(f"{at}: only static weights in natural order without outputs' quantisation are supported")
    grouping = _grouping(weights, at)
    inputs = group.get("input_activations")
    activations = None if inputs is None else _activations(_object(inputs, f"{at}.input_activations"), weights, at)
    if kind == "float":
        if bits != 8 or grouping or not weights.get("symmetric", True):
            raise ArtifactError(f"{at}: floats are supported with 8 bits and one scale per channel or block only")
        name = _float_name(weights, activations, at)
    else:
        name = f"w{bits}a{16 if activations is None else 8}{grouping}"
        name += "" if weights.get("symmetric", True) else "-asym"
        name += "-static" if activations == "static" else ""
    try:
        scheme = parse_scheme(name)
    except ValueError as error:
        raise ArtifactError(f"{at}: {error}") from None
    stored = group.get("format") or outer_format
    if stored != FORMATS[scheme.storage] and (stored, scheme.storage) != NAIVE:
        raise ArtifactError(f"{at}: format {stored!r} is not {FORMATS[scheme.storage]!r}, how {scheme.name} is stored")
    return scheme


def _is_plain(args: dict[str, object]) -> bool:
    plain = {"symmetric": (True, False), "dynamic": (False,), "type": ("int", "float"), "actorder": _NATURAL_ORDER}
    named = {"num_bits", "strategy", "group_size", "block_structure"} | _INERT
    return all(key not in args or _is_among(args[key], known) for key, known in plain.items()) and all(
        value is None for key, value in args.items() if key not in plain and key not in named
    )


def _grouping(weights: dict[str, object], at: str) -> str:
    """Return what the scheme's name says of groups; blocks are in the names of floats."""
    strategy, size, block = (weights.get(key) for key in ("strategy", "group_size", "block_structure"))
    if strategy == "group" and size in GROUP_SIZES and block is None:
        return f"g{size}"
    if strategy == "channel" and size in (None, -1) and block is None:
        return ""
    if strategy == "block" and block == [BLOCK_SIZE, BLOCK_SIZE] and size is None and weights.get("type") == "float":
        return ""
    found = f"group_size {size!r}" if block is None else f"block_structure {block!r}"
    raise ArtifactError(f"{at}: strategy {strategy!r} with {found} is not supported")


def _activations(args: dict[str, object], weights: dict[str, object], at: str) -> str:
    """Return "dynamic" or "static" for activations that are rounded as kernels do it, or refuse them.

    That is by their maximum per token, and per columns of the weights' group or block, or by one scale that is stored.
    """
    columns = weights.get("group_size") if weights.get("strategy") == "group" else None
    columns = BLOCK_SIZE if weights.get("strategy") == "block" else columns
    dynamic: dict[str, object] = {"dynamic": True, "strategy": "token" if columns is None else "group"}
    dynamic |= {} if columns is None else {"group_size": columns}
    static: dict[str, object] = {"dynamic": False, "strategy": "tensor"}
    common = {"num_bits": 8, "type": weights.get("type", "int"), "symmetric": True}
    for name, wanted in (("dynamic", common | dynamic), ("static", common | static)):
        if all(_is_among(args.get(key), (value,)) for key, value in wanted.items()) and all(
            value is None for key, value in args.items() if key not in wanted and key not in _INERT
        ):
            return name
    raise ArtifactError(
        f"{at}: quantised activations are supported as 8 bits of the weights' type, dynamic per token and in the "
        "weights' groups or blocks, or static per tensor, only"
    )


def _float_name(weights: dict[str, object], activations: str | None, at: str) -> str:
    """Return the name of 8-bit floats that meet these activations."""
    is_block = weights.get("strategy") == "block"
    names = {None: "fp8a16", "dynamic": "fp8", "static": "fp8-static"}
    if is_block and activations != "dynamic":
        raise ArtifactError(f"{at}: weights in blocks are supported with dynamic activations only")
    return "fp8-block" if is_block else names[activations]


def _is_among(value: object, known: tuple[object, ...]) -> bool:
    """Whether a value is one of these, where true and false are no numbers."""
    return any(type(value) is type(one) and value == one for one in known)


def _targets(value: object, at: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ArtifactError(f"{at}: needs a list of names or re:patterns")
    for target in value:
        if target.startswith("re:"):
            _check_pattern(target.removeprefix("re:"), at)
    return tuple(value)


def _check_pattern(pattern: str, at: str) -> float:
    """A pattern comes from a file: refuse one whose matching time can explode (backtracking), or that is not valid.

    Returns the steps that one failing match may take.
    """
    if re.search(r"\(\?(?!:)", pattern):
        # Among them (?x), under which a space would hide a repeat from what is counted below.
        raise ArtifactError(f"{at}: pattern {pattern[:80]!r} has an extension (?...); name the linears")
    repeats, groups, bars = (len(re.findall(what, pattern)) for what in (r"[*+?{]", r"\(", r"\|"))
    # Ways to split a name over the repeats times ways to choose alternatives: what a failing match may have to try.
    work: float = _NAME_CHARACTERS**repeats * (bars / max(groups, 1) + 1) ** max(groups, 1)
    if len(pattern) > _MAX_PATTERN or work > _MAX_WORK or re.search(r"\)[*+?{]", pattern):
        raise ArtifactError(f"{at}: pattern {pattern[:80]!r} is too complicated; name the linears")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{at}: pattern {pattern[:80]!r} is not valid ({error})") from None
    return work


def _matches(linear: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), linear) is not None
    return target in (linear, "Linear")


def _object(value: object, at: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{at}: needs an object")
    return value
