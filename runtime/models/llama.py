"""The Llama family: Hugging Face's LlamaForCausalLM."""

from collections.abc import Mapping
from typing import Any

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.layers.rotary import RopeConfig, RopeScaling
from pressd.runtime.models.config import DecoderConfig, require, token_ids


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Map config.json to a decoder; raises ArtifactError for what this decoder does not do."""
    if config.get("hidden_act", "silu") != "silu":
        raise ArtifactError(f"config.json: hidden_act is {config['hidden_act']!r}; Llama is served with silu only")
    hidden_size = require(config, "hidden_size", int)
    num_heads = require(config, "num_attention_heads", int)
    num_kv_heads = require(config, "num_key_value_heads", int) if config.get("num_key_value_heads") else num_heads
    head_dim = require(config, "head_dim", int) if config.get("head_dim") else hidden_size // num_heads
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=require(config, "vocab_size", int),
        max_context=require(config, "max_position_embeddings", int),
        norm_epsilon=require(config, "rms_norm_eps", float),
        rope=read_rope(config),
        eos_token_ids=token_ids(config.get("eos_token_id")),
        input_norm="model.layers.{}.input_layernorm.weight",
        post_attention_norm="model.layers.{}.post_attention_layernorm.weight",
        final_norm="model.norm.weight",
    )


def read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4)."""
    parameters: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, linear_factor=require(parameters, "factor", float))
    if kind == "llama3":
        scaling = RopeScaling(
            factor=require(parameters, "factor", float),
            low_freq_factor=require(parameters, "low_freq_factor", float),
            high_freq_factor=require(parameters, "high_freq_factor", float),
            original_max_position=require(parameters, "original_max_position_embeddings", int),
        )
        return RopeConfig(theta=theta, llama3=scaling)
    raise ArtifactError(f"config.json: rope type {kind!r} is not known; default, linear and llama3 are")
