"""Protos that were changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from promise import PROTOS


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """Copies the protos and changes one of them; a second change goes into the same copy."""
    protos = tmp_path / "protos"
    shutil.copytree(PROTOS, protos, ignore=shutil.ignore_patterns("*.py", "*.pyi", "__pycache__"))

    def change(file: str, old: str, new: str) -> Path:
        path = protos / f"pressd/v1/{file}.proto"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return protos

    return change
