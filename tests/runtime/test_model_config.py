"""The numbers of a model from config.json: rotary frequencies against transformers' own, and what is refused."""

import copy
from typing import Any

import pytest
import torch

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.families import describe
from pressd.runtime.layers.rotary import Rotary
from pressd.runtime.models import FAMILIES
from pressd.runtime.models.config import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Both spellings, and where they meet: (what config.json says of it).
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5000.0},
    {"rope_theta": 5000},
    {"rope_parameters": None, "rope_theta": 5000.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_theta": 5000.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5000.0},
    {"rope_scaling": None, "rope_theta": 5000.0},
    {"rope_scaling": {"type": "linear", "factor": 2.5}},
    {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 5000.0},
    {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 3}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "rope_theta": 500.0},
    {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "original_max_position_embeddings": 16},
    {"rope_scaling": YARN},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
    {"rope_parameters": YARN | {"rope_theta": 100.0}},
    {"rope_parameters": YARN | {"rope_theta": 100.0}, "original_max_position_embeddings": 100},
    {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2}, "rope_theta": 100.0},
    {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None}},
    {"rope_scaling": YARN | {"beta_fast": 3.0, "beta_slow": 0.3, "truncate": False}, "rope_theta": 100.0},
    {"rope_scaling": YARN | {"beta_fast": 2, "beta_slow": 2, "truncate": False}, "rope_theta": 100.0},
    {"rope_scaling": YARN | {"attention_factor": 0.75}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}},
    {"rope_scaling": YARN | {"mscale": 0.7}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0}},
    {"rope_scaling": YARN | {"mscale_all_dim": 0.7}},
    {"rope_scaling": YARN | {"factor": 1.0}},
    {"rope_scaling": YARN | {"factor": 3.3}, "rope_theta": 100.0},
    {"rope_scaling": YARN | {"partial_rotary_factor": 1.0}},
]


def read(family: str = "Qwen3", **changes: Any) -> DecoderConfig:
    config = SIZES | {"architectures": [f"{family}ForCausalLM"]} | copy.deepcopy(changes)
    return FAMILIES[f"{family}ForCausalLM"](config, describe(config))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_rotary_tables_are_transformers(family: str, rope: dict[str, Any]) -> None:
    import transformers.models as models

    module = getattr(models, family.lower())
    their_config = getattr(module, f"{family}Config").from_dict(SIZES | copy.deepcopy(rope))
    rotary = getattr(getattr(module, f"modeling_{family.lower()}"), f"{family}RotaryEmbedding")(their_config)
    positions = torch.arange(100)
    cos, sin = (table[0, :, :16] for table in rotary(torch.empty(1, dtype=torch.float32), positions[None]))
    ours = Rotary(read(family, **rope).rope, 32, 100, torch.device("cpu"), torch.float32)
    # Angles below 100 are rounded by at most three operations of 2^-24 each: 2e-5; so are cosines, times 1.7 at most.
    torch.testing.assert_close(ours.cos, cos, rtol=0, atol=4e-5)
    torch.testing.assert_close(ours.sin, sin, rtol=0, atol=4e-5)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 128),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 128),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}, 128),
        ({"rope_scaling": YARN}, 128),
        ({"rope_scaling": YARN | {"factor": 2.0}}, 128),
        ({"rope_scaling": YARN | {"factor": 6.5}}, 208),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 128}, 512),
        # Without the trained context, max_position_embeddings may be either: nothing says that it is to be stretched.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 128),
    ],
    ids=str,
)
def test_yarn_lengthens_the_context_it_was_given(rope: dict[str, Any], limit: int) -> None:
    assert read(**rope).max_context == limit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is computed"),
        ({"hidden_act": None}, "hidden_act is None; only silu is computed"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a positive number"),
        ({"rms_norm_eps": 10**400}, "it must be a positive number"),
        ({"max_position_embeddings": 1 << 24}, "max_position_embeddings is 16777216; it must be an integer from 1 to"),
        ({"rope_scaling": YARN | {"beta_slow": 5e-324}}, "beta_slow is 5e-324; it must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a positive number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; it must be an integer from 1"),
        (
            {"max_position_embeddings": 1 << 40},
            "max_position_embeddings is 1099511627776; it must be an integer from 1",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a number or a list of numbers is needed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is computed"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not known; known: default, linear",
        ),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope type 'longrope' is not known; known: default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope' is not known"),
        ({"rope_scaling": {"rope_type": None}}, "rope type None is not known"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type ['yarn'] is not known"),
        ({"rope_scaling": 4.0}, "rope_parameters is 4.0; one set of numbers for all layers is needed"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "one set of numbers for all layers is needed"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be above 1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; it must be a positive number"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None; it must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor is -2; it must be a positive number"),
        ({"rope_scaling": {"type": "linear", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor is None; it must be a positive number",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor is 1.0; it must be above low_freq_factor 1.0",
        ),
        ({"rope_scaling": YARN | {"factor": None}}, "factor is None; it must be a positive number"),
        (
            {"rope_scaling": YARN | {"factor": 1e9}},
            "factor 1000000000.0 times original_max_position_embeddings 32 is a",
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 32.5}},
            "original_max_position_embeddings is 32.5; it",
        ),
        ({"rope_scaling": YARN | {"truncate": None}}, "truncate is None; it must be true or false"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is 0; it must be a positive number"),
        ({"rope_scaling": YARN | {"mscale": "1", "mscale_all_dim": 1}}, "mscale is '1'; it must be a positive number"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast is 0.5; it must not be below beta_slow 1.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
