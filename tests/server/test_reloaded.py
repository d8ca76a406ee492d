"""A value that follows its files."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from pressd.server.reloaded import Reloaded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (path := tmp_path / "number").write_text("1")
    return path


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="pressd.files")
    return lambda: [vars(record)["cause"] for record in caplog.records if record.levelno == logging.ERROR]


def test_another_value_is_told_of_once(file: Path) -> None:
    number = Reloaded("number", [file], lambda: int(file.read_text()))
    assert not number.refresh()
    file.write_text("22")
    assert number.refresh()
    assert number.value == 22
    assert not number.refresh()
    file.write_text("022")  # another text of the same value
    assert not number.refresh()


def test_what_cannot_be_read_is_complained_of_once_and_tried_again(
    file: Path, complaints: Callable[[], list[str]]
) -> None:
    out_of_descriptors = True

    def read() -> int:
        if out_of_descriptors and file.read_text() != "1":
            raise OSError("too many open files")
        return int(file.read_text())

    number = Reloaded("number", [file], read)
    file.write_text("22")
    assert not number.refresh()
    assert not number.refresh()
    assert (number.value, complaints()) == (1, ["too many open files"])
    out_of_descriptors = False
    assert number.refresh()  # although the file did not change again
    assert number.value == 22
    file.unlink()
    assert not number.refresh()
    assert number.value == 22
    assert len(complaints()) == 2
    file.write_text("22")
    assert not number.refresh()
    file.unlink()
    assert not number.refresh()
    assert len(complaints()) == 3  # it had been good in between


def test_a_file_replaced_while_it_is_read_is_no_complaint(file: Path, complaints: Callable[[], list[str]]) -> None:
    def read() -> int:
        text = file.read_text()
        if text == "half":
            file.write_text("333")
        return int(text)

    number = Reloaded("number", [file], read)
    file.write_text("half")
    assert not number.refresh()
    assert complaints() == []
    assert number.refresh()
    assert number.value == 333


def test_what_is_bad_at_first_is_raised(file: Path) -> None:
    file.write_text("one")
    with pytest.raises(ValueError, match="one"):
        Reloaded("number", [file], lambda: int(file.read_text()))
