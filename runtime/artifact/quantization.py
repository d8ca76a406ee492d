"""config.json's `quantization_config`, in compressed-tensors' words or our own: which scheme each linear is stored in.

Only what the kernels compute exactly is accepted; a key that would change the numbers and is not known here is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.families import EMBED, EMBED_PREFIX, ModelMap
from pressd.runtime.artifact.own_config import MODEL_TYPE
from pressd.runtime.artifact.schemes import FLOATS, GROUP_SIZES, Scheme, parse_scheme

FORMATS = {"packed_int": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
# What compressed-tensors calls 8-bit floats that meet activations in 16 bits; they are stored in the same way.
NAIVE = ("naive-quantized", "fp8")
MIXED = "mixed-precision"
_MAX_PATTERN = 4096
_NAME_CHARACTERS = 64
_MAX_WORK = 1e6
_MAX_WORK_IN_ALL = 2e9  # some tens of seconds at worst; real files stay far below
# Keys of compressed-tensors that change nothing about how a finished symmetric checkpoint is decoded.
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
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config"):
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
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if type(bits) is not int:
        raise ArtifactError(f"{at}.weights: num_bits is {bits!r}; it must be an integer")
    strategy = weights.get("strategy")
    inputs = group.get("input_activations")
    kind = weights.get("type", "int")
    if not _is_plain(weights) or group.get("output_activations"):
        raise ArtifactError(f"{at}: only symmetric static weights without outputs' quantisation are supported")
    if strategy == "group" and size in GROUP_SIZES:
        grouping = f"g{size}"
    elif strategy == "channel" and size in (None, -1):
        grouping = ""
    else:
        raise ArtifactError(f"{at}: strategy {strategy!r} with group_size {size!r} is not supported")
    if inputs is not None and not _is_dynamic_8(
        _object(inputs, f"{at}.input_activations"), kind, size if grouping else None
    ):
        raise ArtifactError(
            f"{at}: quantised activations are supported as 8 bits of the weights' type, dynamic, per token or in the "
            "weights' groups only"
        )
    activation_bits = 16 if inputs is None else 8
    if kind == "float":
        if bits != 8 or grouping:
            raise ArtifactError(f"{at}: floats are supported with 8 bits and one scale per channel only")
        name = next(name for name, own in FLOATS.items() if own == activation_bits)
    else:
        name = f"w{bits}a{activation_bits}{grouping}"
    try:
        scheme = parse_scheme(name)
    except ValueError as error:
        raise ArtifactError(f"{at}: {error}") from None
    stored = group.get("format") or outer_format
    if stored != FORMATS[scheme.storage] and (stored, scheme.storage) != NAIVE:
        raise ArtifactError(f"{at}: format {stored!r} is not {FORMATS[scheme.storage]!r}, how {scheme.name} is stored")
    return scheme


def _is_plain(args: dict[str, object]) -> bool:
    plain = {"symmetric": True, "dynamic": False}
    named = {"type", "num_bits", "strategy", "group_size", "actorder"} | _INERT
    return (
        all(args.get(key, plain[key]) == plain[key] for key in plain)
        and args.get("type", "int") in ("int", "float")
        and args.get("actorder") in _NATURAL_ORDER
        and all(value is None for key, value in args.items() if key not in plain and key not in named)
    )


def _is_dynamic_8(args: dict[str, object], kind: object, group_size: object) -> bool:
    """Whether activations are rounded as kernels do it: by their maximum per token and, if any, weights' group."""
    wanted: dict[str, object] = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True}
    wanted |= {"strategy": "token"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return all(args.get(key) == value for key, value in wanted.items()) and all(
        value is None for key, value in args.items() if key not in wanted and key not in _INERT
    )


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
