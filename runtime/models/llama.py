"""Llama, and what computes as it does: the numbers of a decoder beside its shapes."""

from pressd.runtime.artifact import fields
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.families import ModelMap
from pressd.runtime.artifact.fields import Config
from pressd.runtime.models.config import DecoderConfig, token_ids
from pressd.runtime.models.rope import context_limit, read_rope


def read_config(config: Config, model: ModelMap) -> DecoderConfig:
    """Map config.json to a decoder; raises ArtifactError for what this decoder does not do.

    Mistral and Qwen2 differ from Llama in biases and windows only, which their maps say.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise ArtifactError(f"config.json: hidden_act is {config['hidden_act']!r}; only silu is computed")
    return DecoderConfig(
        architecture=model.architecture,
        hidden_size=fields.size(config, "hidden_size"),
        num_heads=model.attention.num_heads,
        num_kv_heads=model.attention.num_kv_heads,
        head_dim=model.attention.head_dim,
        windows=model.attention.windows,
        vocab_size=fields.size(config, "vocab_size"),
        max_context=context_limit(config),
        norm_epsilon=fields.number(config, "rms_norm_eps"),
        rope=read_rope(config),
        eos_token_ids=token_ids(config.get("eos_token_id")),
        input_norm="model.layers.{}.input_layernorm.weight",
        post_attention_norm="model.layers.{}.post_attention_layernorm.weight",
        final_norm="model.norm.weight",
    )
