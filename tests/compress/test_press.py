"""Pressing: what appears in the directory, that it appears whole or not at all, and always the same."""

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.compress.encoding import decode
from pressd.compress.press import BlockDone
from pressd.runtime.artifact.reader import Checkpoint

WEIGHTS = "model.safetensors"


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_directory_is_complete(tiny_llama: Path, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    shutil.copytree(tiny_llama, source, dirs_exist_ok=True)
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "pytorch_model.bin", "train.log"):
        (source / name).write_text("{}")
    manifest = compress(source, "w4a16g32", tmp_path / "out")
    kept = {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert manifest.files.keys() == kept | {"config.json", WEIGHTS}
    found = contents(tmp_path / "out")
    assert found.keys() == manifest.files.keys() | {
        f"pressd/{name}" for name in ("manifest.json", "report.json", "report.html", "recipe.toml", "journal.jsonl")
    }
    for name in kept:
        assert found[name] == (source / name).read_bytes()
    for name, file in manifest.files.items():
        assert (file.bytes, file.sha256) == (len(found[name]), hashlib.sha256(found[name]).hexdigest())
    assert manifest.source.files[WEIGHTS].sha256 == hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()


def test_the_manifest_accounts_for_every_byte_and_error(tiny_llama: Path, tmp_path: Path) -> None:
    manifest = compress(tiny_llama, "w3a16g32", tmp_path / "out")
    source, ours = Checkpoint.open(tiny_llama), Checkpoint.open(tmp_path / "out")
    assert [group.name for group in manifest.plan][:3] == ["embed", "layers.0.qkv", "layers.0.o"]
    assert manifest.plan[1].members == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert manifest.plan[1].shape == (128, 64)
    for group in manifest.plan:
        weights = [source.tensor(f"{name}.weight") for name in group.members]
        tensors = [ours.linear_tensors(name) for name in group.members]
        decoded = [decode(t, ours.linear(n), torch.float64) for t, n in zip(tensors, group.members, strict=True)]
        expected = torch.linalg.norm(torch.cat(decoded) - torch.cat(weights)) / torch.linalg.norm(torch.cat(weights))
        # It is measured on products rounded to float32, 2^-24 of a weight, where the error itself is a tenth of one.
        assert group.error == pytest.approx(float(expected), rel=1e-5)
        assert group.bytes == sum(tensor.nbytes for part in tensors for tensor in part.values())
    pressed = [group for group in manifest.plan if group.scheme == "w3a16g32"]
    totals = manifest.totals
    assert totals.params == sum(tensor.numel() for tensor in load_file(tiny_llama / WEIGHTS).values())
    assert totals.dense_bytes == 4 * totals.params
    assert totals.bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert totals.ratio == totals.dense_bytes / totals.bytes
    assert totals.bpw == 8 * sum(g.bytes for g in pressed) / sum(g.shape[0] * g.shape[1] for g in pressed)


def test_what_is_kept_is_kept_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "w2a16", tmp_path / "out")
    source, ours = load_file(tiny_llama / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(source[name], ours[name])


def test_there_is_a_journal_line_and_a_call_per_block(tiny_llama: Path, tmp_path: Path) -> None:
    told: list[BlockDone] = []
    manifest = compress(tiny_llama, "w8a8", tmp_path / "out", progress=told.append)
    assert [(block.block, block.done, block.total) for block in told] == [
        ("embed", 1, 4),
        ("layers.0", 2, 4),
        ("layers.1", 3, 4),
        ("head", 4, 4),
    ]
    first, *lines = [json.loads(line) for line in (tmp_path / "out/pressd/journal.jsonl").read_text().splitlines()]
    assert list(first) == ["fingerprint"]
    assert [line["block"] for line in lines] == [block.block for block in told]
    assert {tuple(line) for line in lines} == {("block", "groups", "sha256")}
    assert [group["name"] for line in lines for group in line["groups"]] == [group.name for group in manifest.plan]


@pytest.mark.parametrize("shard_bytes", [1, 40_000, 1 << 30])
def test_two_runs_give_the_same_bytes(tiny_llama: Path, shard_bytes: int, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        compress(tiny_llama, "w5a16g32", tmp_path / name, shard_bytes=shard_bytes)
        runs.append(contents(tmp_path / name))
    assert runs[0].keys() == runs[1].keys()
    # The report and its page say how long each block took.
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} <= {"pressd/report.json", "pressd/report.html"}


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "w3a16g32"])
def test_however_many_files_the_tensors_are_the_same(tiny_llama: Path, scheme: str, tmp_path: Path) -> None:
    compress(tiny_llama, scheme, tmp_path / "one")
    compress(tiny_llama, scheme, tmp_path / "many", shard_bytes=30_000)
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len(many.weight_files) > 3
    assert one.names() == many.names()
    for name in one.names():
        assert torch.equal(one.tensor(name), many.tensor(name))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    sizes = sum(tensor.nbytes for file in many.weight_files for tensor in load_file(tmp_path / "many" / file).values())
    assert index["metadata"]["total_size"] == sizes


class _Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, _Stop])
@pytest.mark.parametrize("after", ["embed", "layers.1", "head"])
def test_an_interruption_leaves_nothing(
    tiny_llama: Path, error: type[BaseException], after: str, tmp_path: Path
) -> None:
    def interrupt(block: BlockDone) -> None:
        if block.block == after:
            raise error

    with pytest.raises(error):
        compress(tiny_llama, "w4a16g32", tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        compress(tiny_llama, "w4a16g32", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_noticed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(descriptor: int) -> None:
        # The narrowest type comes last in a file: this is the last code of the last pressed linear.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.pwrite(descriptor, b"\x80", os.fstat(descriptor).st_size - 1)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(OSError, match=r"layers\.1\.mlp\.down_proj\.weight reads back otherwise than it was written"):
        compress(tiny_llama, "w8a8", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "scheme", "message"),
    [
        (float("nan"), "w4a16g32", "model.layers.1.mlp.up_proj.weight holds NaN or infinity; repair the checkpoint"),
        (float("inf"), "bf16", "model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
        (1e5, "fp16", "model.layers.1.mlp.up_proj.weight has values that do not fit torch.float16"),
    ],
)
def test_a_weight_that_cannot_be_stored_is_named(
    tiny_llama: Path, value: float, scheme: str, message: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    tensors = load_file(source / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        compress(source, scheme, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_recipe_file_is_kept_word_for_word(tiny_llama: Path, tmp_path: Path) -> None:
    text = '# a comment\n[scheme]\n"*" = "w4a16g32"\n[gates]\nkl_mean = 0.5\n'
    (tmp_path / "r.toml").write_text(text)
    manifest = compress(tiny_llama, tmp_path / "r.toml", tmp_path / "out")
    assert (tmp_path / "out/pressd/recipe.toml").read_text() == manifest.recipe.text == text
    assert manifest.gates == {"kl_mean": 0.5}


def test_an_unknown_scheme_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scheme 'w9a16' is not known; choose one of"):
        compress(tiny_llama, "w9a16", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
