"""config.json of an artifact that other tools have no words for: they must refuse it, not read garbage.

Its model_type is one that no other loader knows. What the model is stays in the file, under `pressd`; which scheme each
fused group is stored in is its `quantization_config`.
"""

from collections.abc import Mapping

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.kv_scales import KEY as KV_KEY
from pressd.runtime.artifact.kv_scales import KVScheme

MODEL_TYPE = "pressd"
ARCHITECTURE = "PressdForCausalLM"
_KEPT = ("architectures", "model_type")
# Names under which a config would make a loader of models from a hub run code or pick a class by itself.
_OTHER_LOADERS = ("auto_map",)


def hide(
    config: Mapping[str, object], schemes: Mapping[str, str], kv_scheme: KVScheme | None = None
) -> dict[str, object]:
    """Return `config` under the name that only this reader knows; `schemes` by fused group."""
    kv_words = {} if kv_scheme is None else {KV_KEY: kv_scheme.to_config()}
    hidden = {key: value for key, value in config.items() if key not in _OTHER_LOADERS}
    return hidden | {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "pressd": {key: config[key] for key in _KEPT if key in config},
        "quantization_config": {"quant_method": MODEL_TYPE, "schemes": dict(schemes)} | kv_words,
    }


def restore(config: dict[str, object]) -> dict[str, object]:
    """Return the config that `hide` was given, with its `quantization_config`; any other config as it is."""
    if config.get("model_type") != MODEL_TYPE:
        return config
    kept = config.get("pressd")
    if not isinstance(kept, dict) or not kept.keys() <= set(_KEPT) or not isinstance(kept.get("model_type", ""), str):
        raise ArtifactError("config.json: pressd must be an object with architectures and model_type; press it again")
    return {key: value for key, value in config.items() if key not in ("pressd", *_KEPT)} | kept
