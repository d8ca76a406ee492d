"""Loads the tokenizer of a model directory, with transformers."""

from pathlib import Path
from typing import Any

from pressd.runtime.artifact.directory import read_config
from pressd.runtime.artifact.own_config import MODEL_TYPE, restore


def load_tokenizer(path: Path) -> Any:
    """Return transformers' tokenizer of the directory; raises what transformers raises, runs no code from it.

    Which class that is depends on the model's type: an artifact that hides its own from other loaders tells it here.
    """
    from transformers import AutoConfig, AutoTokenizer

    stored = read_config(path) if (path / "config.json").is_file() else {}
    model_type = restore(stored).get("model_type") if stored.get("model_type") == MODEL_TYPE else None
    config = None if model_type is None else AutoConfig.for_model(model_type)
    return AutoTokenizer.from_pretrained(path, config=config, local_files_only=True, trust_remote_code=False)
