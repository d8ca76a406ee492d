"""Qwen3: as Llama, with each head of the queries and keys normalised before it is rotated."""

from dataclasses import replace

from pressd.runtime.artifact.families import ModelMap
from pressd.runtime.artifact.fields import Config
from pressd.runtime.models import llama
from pressd.runtime.models.config import DecoderConfig


def read_config(config: Config, model: ModelMap) -> DecoderConfig:
    """Map config.json to a decoder; raises ArtifactError for what this decoder does not do."""
    return replace(
        llama.read_config(config, model),
        query_norm="model.layers.{}.self_attn.q_norm.weight",
        key_norm="model.layers.{}.self_attn.k_norm.weight",
    )
