"""The maps of the families: against transformers' own modules on no memory, and what they refuse."""

import enum
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.families import FAMILIES, ModelMap, describe

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
}


class Sentinel(enum.Enum):
    ABSENT = "absent"

    def __repr__(self) -> str:
        return self.name  # tests are named by it


ABSENT = Sentinel.ABSENT
WINDOW = {"use_sliding_window": True, "sliding_window": 7}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    content = SIZES | {"architectures": [f"{family}ForCausalLM"]} | changes
    return {key: value for key, value in content.items() if value is not ABSENT}


def theirs(family: str, config: Mapping[str, Any]) -> Any:
    """What transformers makes of the same config.json."""
    import transformers

    return getattr(transformers, f"{family}Config").from_dict(dict(config))


def stored(model: ModelMap) -> dict[str, tuple[int, ...]]:
    return model.others() | {f"{linear.prefix}.weight": linear.shape for linear in model.linears()}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True}),
    ("Llama", {"num_key_value_heads": ABSENT, "head_dim": ABSENT, "attention_bias": True}),
    ("Llama", {"mlp_bias": True, "sliding_window": 5}),
    ("Mistral", {"attention_bias": True, "mlp_bias": True}),
    ("Mistral", {"num_attention_heads": 16, "num_key_value_heads": ABSENT, "sliding_window": None}),
    ("Mistral", {"num_key_value_heads": 1, "head_dim": None, "sliding_window": 5}),
    ("Mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3}),
    ("Qwen2", {"attention_bias": False}),
    ("Qwen2", {"hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": ABSENT, "head_dim": ABSENT}),
    ("Qwen2", {"num_key_value_heads": None, "tie_word_embeddings": True}),
    ("Qwen2", {"sliding_window": 5, "max_window_layers": 1}),
    ("Qwen2", {"num_hidden_layers": 30, "use_sliding_window": True}),
    ("Qwen2", WINDOW | {"max_window_layers": 1}),
    ("Qwen2", WINDOW | {"max_window_layers": 0, "layer_types": None}),
    ("Qwen2", WINDOW | {"max_window_layers": 5}),
    ("Qwen2", WINDOW | {"sliding_window": None, "max_window_layers": 0}),
    ("Qwen2", WINDOW | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("Qwen2", {"layer_types": ["full_attention"] * 3}),
    ("Qwen3", {"num_attention_heads": 32, "num_key_value_heads": ABSENT, "head_dim": ABSENT}),
    ("Qwen3", {"attention_bias": True, "mlp_bias": True}),
    ("Qwen3", WINDOW | {"max_window_layers": 2, "tie_word_embeddings": True}),
    ("Qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
]


@pytest.mark.filterwarnings("ignore:.*Mistral model with layer_types")
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_tensors_and_windows_are_transformers(family: str, changes: dict[str, Any]) -> None:
    """Every name and shape, and each layer's window, for what is stated, null and left out."""
    import transformers

    config = config_of(family, **changes)
    model, their_config = describe(config), theirs(family, config)
    with torch.device("meta"):
        state = getattr(transformers, f"{family}ForCausalLM")(their_config).state_dict()
    if model.tied:
        assert state.pop("lm_head.weight").shape == state["model.embed_tokens.weight"].shape
    assert stored(model) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    window = getattr(their_config, "sliding_window", None) if family != "Llama" else None
    kinds = getattr(their_config, "layer_types", None) or ["sliding_attention"] * their_config.num_hidden_layers
    assert model.attention.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": ABSENT}, "hidden_size is None; it must be an integer from 1 to 16777216"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; it must be an integer"),
        ({"vocab_size": True}, "vocab_size is True; it must be an integer"),
        ({"intermediate_size": "96"}, "intermediate_size is '96'; it must be an integer"),
        ({"intermediate_size": 1 << 25}, "intermediate_size is 33554432; it must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be an integer from 1 to 4096"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers is 5000; it must be an integer from 1 to 4096"),
        ({"num_attention_heads": ABSENT}, "num_attention_heads is None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
        ({"head_dim": 7}, "head_dim is 7; rotary position embedding needs an even number"),
        ({"head_dim": -24}, "head_dim is -24; it must be an integer"),
        ({"head_dim": None, "num_attention_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None; it must be true or false"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sizes_that_no_model_has_are_refused(family: str, changes: dict[str, Any], said: str) -> None:
    refused(config_of(family, **changes), said)


MIXED = ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("Llama", {"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ("Llama", {"mlp_bias": "yes"}, "mlp_bias is 'yes'; it must be true or false"),
        ("Qwen3", {"attention_bias": None}, "attention_bias is None; it must be true or false"),
        ("Mistral", {"sliding_window": 0}, "sliding_window is 0; it must be an integer from 1 to 16777216"),
        ("Mistral", {"sliding_window": -4096}, "sliding_window is -4096; it must be an integer"),
        ("Mistral", {"sliding_window": 4096.0}, "sliding_window is 4096.0; it must be an integer"),
        ("Mistral", {"sliding_window": True}, "sliding_window is True; it must be an integer"),
        ("Mistral", {"layer_types": MIXED}, "sliding_window 4096 makes of all; this architecture does not mix them"),
        (
            "Mistral",
            {"layer_types": ["sliding_attention"] * 3, "sliding_window": None},
            "other layers than full_attention",
        ),
        ("Mistral", {"layer_types": ["sliding_attention"]}, "layer_types has 1 entries; num_hidden_layers is 3"),
    ]
    + [
        (family, WINDOW | changes, said)
        for family in ("Qwen2", "Qwen3")
        for changes, said in (
            ({"sliding_window": 0}, "sliding_window is 0; it must be an integer from 1"),
            ({"sliding_window": -1}, "sliding_window is -1; it must be an integer from 1"),
            ({"sliding_window": "7"}, "sliding_window is '7'; it must be an integer from 1"),
            ({"use_sliding_window": None}, "use_sliding_window is None; it must be true or false"),
            ({"max_window_layers": -1}, "max_window_layers is -1; it must be an integer from 0"),
            ({"max_window_layers": None}, "max_window_layers is None; it must be an integer from 0"),
            ({"layer_types": MIXED[:2]}, "layer_types has 2 entries; num_hidden_layers is 3"),
            ({"layer_types": [*MIXED, MIXED[0]]}, "layer_types has 4 entries; num_hidden_layers is 3"),
            ({"layer_types": "full_attention"}, "layer_types has 'full_attention'; num_hidden_layers is 3"),
            ({"layer_types": [*MIXED[:2], "chunked_attention"]}, "layer_types names 'chunked_attention'; known: full_"),
            ({"layer_types": [*MIXED[:2], None]}, "layer_types names None; known: full_attention, sliding_attention"),
            ({"layer_types": MIXED, "use_sliding_window": False}, "names sliding_attention without a window; set use_"),
            ({"layer_types": MIXED, "sliding_window": None}, "names sliding_attention without a window; set use_sl"),
        )
    ],
)
def test_contradictions_are_refused(family: str, changes: dict[str, Any], said: str) -> None:
    refused(config_of(family, **changes), said)


@pytest.mark.parametrize(
    "architectures", [None, [], ["GPT2LMHeadModel"], "LlamaForCausalLM2", ["LlamaForCausalLM", "Qwen2ForCausalLM"], 7]
)
def test_an_unknown_architecture_is_refused_with_those_known(architectures: object) -> None:
    refused(
        SIZES | {"architectures": architectures},
        "is not known; known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    )


def test_every_family_can_be_loaded() -> None:
    from pressd.runtime.models import FAMILIES as LOADED

    assert FAMILIES.keys() == LOADED.keys()


def refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        describe(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
