"""Tiny models of each family with random weights, as transformers saves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_family(family: str, shape: Mapping[str, Any], path: Path) -> None:
    """Save a model of `family` (Llama, Mistral, ...); gains and biases, else alike, are spread around 1."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**shape)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(path)
