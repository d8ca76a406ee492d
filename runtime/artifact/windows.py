"""How far back each decoder layer looks: a sliding window per layer (Beltagy et al. 2020, arXiv 2004.05150), or none.

A window counts the positions that a token sees, its own included; None is all of them.
"""

from pressd.runtime.artifact import fields
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.fields import Config

Windows = tuple[int | None, ...]

FULL, SLIDING = "full_attention", "sliding_attention"


def full_windows(config: Config, num_layers: int) -> Windows:
    """Return no window for any layer."""
    return (None,) * num_layers


def uniform_windows(config: Config, num_layers: int) -> Windows:
    """Return Mistral's windows: `sliding_window` in every layer, or in none where it is null.

    Raises ArtifactError if `layer_types` is there and says otherwise: transformers does not look at it.
    """
    window = None if config.get("sliding_window") is None else fields.size(config, "sliding_window")
    implied = FULL if window is None else SLIDING
    if any(kind != implied for kind in _layer_types(config, num_layers) or ()):
        raise ArtifactError(
            f"config.json: layer_types names other layers than {implied}, which sliding_window {window} makes of all; "
            "this architecture does not mix them"
        )
    return (window,) * num_layers


def mixed_windows(config: Config, num_layers: int) -> Windows:
    """Return Qwen's windows, if `use_sliding_window`: by `layer_types`, else from layer `max_window_layers` on.

    Raises ArtifactError for a layer that slides without a window.
    """
    slides = fields.flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    window = fields.size(config, "sliding_window") if slides else None
    kinds = _layer_types(config, num_layers)
    if kinds is None:
        first = fields.size(config, "max_window_layers", least=0)
        return tuple(window if index >= first else None for index in range(num_layers))
    if SLIDING in kinds and window is None:
        raise ArtifactError(
            f"config.json: layer_types names {SLIDING} without a window; set use_sliding_window and sliding_window"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _layer_types(config: Config, num_layers: int) -> list[str] | None:
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        counted = f"{len(kinds)} entries" if isinstance(kinds, list) else repr(kinds)
        raise ArtifactError(f"config.json: layer_types has {counted}; num_hidden_layers is {num_layers}")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ArtifactError(f"config.json: layer_types names {kind!r}; known: {FULL}, {SLIDING}")
    return kinds
