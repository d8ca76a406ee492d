"""What a model directory holds besides weights and config.json: text in and out, and the terms of use."""

import shutil
from pathlib import Path

COMPANIONS = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)


def companions(source: Path) -> list[str]:
    """Return the names of the files of `source` that go with any weights of that model, sorted."""
    return sorted({path.name for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})


def copy_companions(source: Path, directory: Path) -> None:
    """Copy the files of `source` that go with any weights of that model."""
    for name in companions(source):
        shutil.copyfile(source / name, directory / name)
