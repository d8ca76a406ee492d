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


def copy_companions(source: Path, directory: Path) -> None:
    """Copy the files of `source` that go with any weights of that model."""
    found = {path.name for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    for name in sorted(found):
        shutil.copyfile(source / name, directory / name)
