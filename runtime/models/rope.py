"""Rotary position embedding as config.json spells it: `rope_parameters`, or `rope_theta` with `rope_scaling`."""

from collections.abc import Callable

from pressd.runtime.artifact import fields
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.fields import Config
from pressd.runtime.layers.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling, yarn_magnitude
from pressd.runtime.layers.rotary import RopeConfig

_ORIGINAL = "original_max_position_embeddings"


def read_rope(config: Config) -> RopeConfig:
    """Return the frequencies' base and scaling, with transformers' precedence between the two spellings.

    Raises ArtifactError for a type, or a part of one, that this decoder does not compute.
    """
    parameters = _parameters(config)
    theta = fields.number(parameters, "rope_theta")
    if theta <= 1:
        raise ArtifactError(f"config.json: rope_theta is {theta}; it must be above 1")
    if fields.number(parameters, "partial_rotary_factor", default=1.0) != 1:
        raise ArtifactError(
            f"config.json: partial_rotary_factor is {parameters['partial_rotary_factor']}; only 1 is computed"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    read = _TYPES.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise ArtifactError(f"config.json: rope type {kind!r} is not known; known: {', '.join(_TYPES)}")
    return read(parameters, theta)


# Cosines and sines are tabulated: a config that says more would only be used to exhaust memory.
MAX_CONTEXT = 1 << 20


def context_limit(config: Config) -> int:
    """Return the longest sequence: `max_position_embeddings`, or what YaRN stretches the trained context to if longer.

    Qwen's configs gain YaRN without a change to max_position_embeddings.
    """
    limit = fields.size(config, "max_position_embeddings", limit=MAX_CONTEXT)
    scaling = read_rope(config).scaling
    if not isinstance(scaling, YarnScaling) or _stated_original(config) is None:
        return limit
    stretched = scaling.original_max_position * scaling.factor
    if stretched > MAX_CONTEXT:
        raise ArtifactError(
            f"config.json: factor {scaling.factor} times {_ORIGINAL} {scaling.original_max_position} is a context of "
            f"more than {MAX_CONTEXT}"
        )
    return max(limit, int(stretched))


def _parameters(config: Config) -> dict[str, object]:
    """Both spellings as one dictionary, with the keys that may stand beside it filled in."""
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise ArtifactError(f"config.json: rope_parameters is {stated!r}; one set of numbers for all layers is needed")
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    original = _stated_original(config)
    trained = config.get("max_position_embeddings") if original is None else original
    return {"rope_theta": 10000.0} | beside | stated | {_ORIGINAL: trained}


def _stated_original(config: Config) -> object:
    """What config.json says of the trained context; beside the parameters it outranks what they say."""
    stated = config.get("rope_scaling") or config.get("rope_parameters")
    within = stated.get(_ORIGINAL) if isinstance(stated, dict) else None
    return config.get(_ORIGINAL, within)


def _default(parameters: Config, theta: float) -> RopeConfig:
    return RopeConfig(theta=theta)


def _linear(parameters: Config, theta: float) -> RopeConfig:
    return RopeConfig(theta=theta, scaling=LinearScaling(factor=fields.number(parameters, "factor")))


def _llama3(parameters: Config, theta: float) -> RopeConfig:
    scaling = Llama3Scaling(
        factor=fields.number(parameters, "factor"),
        low_freq_factor=fields.number(parameters, "low_freq_factor"),
        high_freq_factor=fields.number(parameters, "high_freq_factor"),
        original_max_position=fields.size(parameters, _ORIGINAL),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ArtifactError(
            f"config.json: high_freq_factor is {scaling.high_freq_factor}; "
            f"it must be above low_freq_factor {scaling.low_freq_factor}"
        )
    return RopeConfig(theta=theta, scaling=scaling)


def _yarn(parameters: Config, theta: float) -> RopeConfig:
    scaling = YarnScaling(
        factor=fields.number(parameters, "factor"),
        original_max_position=fields.size(parameters, _ORIGINAL),
        beta_fast=fields.number(parameters, "beta_fast", default=32.0),
        beta_slow=fields.number(parameters, "beta_slow", default=1.0),
        truncate=fields.flag(parameters, "truncate", default=True),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise ArtifactError(
            f"config.json: beta_fast is {scaling.beta_fast}; it must not be below beta_slow {scaling.beta_slow}"
        )
    # Without both scales transformers uses neither; 0 stands for an absent one there as well.
    mscale, all_dim = (parameters.get(key) or None for key in ("mscale", "mscale_all_dim"))
    if mscale is None or all_dim is None:
        recommended = yarn_magnitude(scaling.factor)
    else:
        scales = (fields.number(parameters, key) for key in ("mscale", "mscale_all_dim"))
        recommended = yarn_magnitude(scaling.factor, *scales)
    magnitude = fields.number(parameters, "attention_factor", default=recommended)
    return RopeConfig(theta=theta, scaling=scaling, magnitude=magnitude)


_TYPES: dict[str, Callable[[Config, float], RopeConfig]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
