"""Forecasts: sizes are those of the artifact that pressing then writes, and no weights are read for them."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch

from pressd.compress import compress
from pressd.compress.forecast import ALLOCATOR_KEEPS, Forecast, make_forecast
from pressd.compress.forecast_text import forecast_json, show_forecast
from pressd.compress.memory import peak_bytes
from pressd.compress.plan import make_plan
from pressd.compress.rates import Rates, work
from pressd.compress.recipe import Recipe, parse_recipe, recipe_of_scheme
from pressd.runtime.artifact.families import describe
from pressd.runtime.artifact.reader import Checkpoint

MIXED = '"*" = "w4a16g32"\n"layers.1.*" = "w8a8"\n"layers.1.down" = "w3a16"\n"embed" = "w8a16"\n"lm_head" = "keep"'


def recipe_of(rules: str) -> Recipe:
    return parse_recipe(f"[scheme]\n{rules}\n", "recipe") if "=" in rules else recipe_of_scheme(rules)


def forecast_of(source: Path, rules: str, seconds: float = 1e-9) -> Forecast:
    """A forecast at rates that are given, for a process of 1000 bytes."""
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, recipe_of(rules))
    schemes = {group.scheme for group in plan.groups()}
    rates = Rates(seconds_per_work=dict.fromkeys(schemes, seconds), seconds_per_hashed_byte=2 * seconds)
    return make_forecast(checkpoint, plan, rates, 1000)


@pytest.mark.parametrize("source", ["tiny_llama", "tiny_llama_tied"])
@pytest.mark.parametrize(
    "rules", ["w4a16g32", "w8a8", "w3a16", "bf16", "sparse24:w4a16", "lowrank8:w8a16", "w2a16g32+residual4", MIXED]
)
def test_sizes_are_what_pressing_writes(
    source: str, rules: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(source)
    forecast = forecast_of(path, rules)
    manifest = compress(path, recipe_of(rules), tmp_path / "out")
    assert forecast.totals == manifest.totals
    for ours, stored in zip(forecast.groups, manifest.plan, strict=True):
        for field in ("name", "members", "scheme", "passes", "shape", "bits", "bytes"):
            assert getattr(ours, field) == getattr(stored, field)
    assert forecast.time.written_bytes == manifest.totals.bytes


def test_a_head_that_is_untied_is_counted(tiny_llama: Path, tiny_llama_tied: Path) -> None:
    rules = '"*" = "w4a16g32"\n"lm_head" = "w8a16"'
    forecast = forecast_of(tiny_llama_tied, rules)
    (head,) = [group for group in forecast.groups if group.name == "lm_head"]
    assert forecast.untied_bytes == head.bytes > 0
    assert "the head is no longer the embedding: stored apart, it adds 0.01 MiB" in show_forecast(forecast)
    for source, others in ((tiny_llama_tied, "w4a16g32"), (tiny_llama, rules)):
        kept = forecast_of(source, others)
        assert kept.untied_bytes == 0
        assert "no longer" not in show_forecast(kept)


def test_estimates_follow_from_the_rates_and_the_shapes(tiny_llama: Path) -> None:
    forecast = forecast_of(tiny_llama, "lowrank8:w8a16", seconds=1e-6)
    plan = make_plan(Checkpoint.open(tiny_llama), recipe_of("lowrank8:w8a16"))
    source_bytes = (tiny_llama / "model.safetensors").stat().st_size
    # An SVD costs rows x columns x the shorter side; embedding, head and norms are copied, norms for nothing.
    pressed = 2 * (64 * 64 * 64 + 2 * 32 * 64 * 32 + 64 * 64 * 64 + 3 * 160 * 64 * 64)
    copied = 2 * 97 * 64
    # The source is digested once, what is written once for the manifest and once more when it is opened.
    hashed = source_bytes + 2 * forecast.totals.bytes
    assert forecast.time.compute_seconds == pytest.approx(1e-6 * (pressed + copied + 2 * hashed))
    assert forecast.time.read_bytes == forecast.memory.mapped_bytes == source_bytes
    assert forecast.memory.process_bytes == 1000
    working = peak_bytes(plan, torch.float32, lambda name: "model.safetensors")
    assert (forecast.memory.working_bytes, forecast.memory.allocator_bytes) == (working, min(working, ALLOCATOR_KEEPS))
    assert work(next(iter(plan.groups()[0].specs.values()))) == 97 * 64


@pytest.mark.parametrize(
    ("rules", "warned"),
    [
        ("w4a16g32", []),
        ("w8a8", []),
        ("bf16", []),
        ("w5a16", []),
        ("w4a16", ["w4a16: weights rounded to nearest at 4 bits per channel can ruin a model; measure it with"]),
        ("w4a8", ["w4a8: weights rounded to nearest at 4 bits per channel"]),
        ("w3a16g32", ["w3a16g32: weights rounded to nearest at 3 bits can ruin"]),
        ("w2a16", ["w2a16: weights rounded to nearest at 2 bits per channel can ruin"]),
        ("w3a16g32+residual4", ["w3a16g32+residual4: weights rounded to nearest at 3 bits"]),
        ("lowrank8:w4a16", ["lowrank8:w4a16: weights rounded to nearest at 4 bits per channel"]),
        ('"*" = "w8a16"\n"o" = "w2a16g32"\n"down" = "w3a16"', ["w2a16g32: ", "w3a16: "]),
    ],
)
def test_what_ruins_models_is_warned_of(tiny_llama: Path, rules: str, warned: list[str]) -> None:
    warnings = forecast_of(tiny_llama, rules).warnings
    assert len(warnings) == len(warned)
    for found, expected in zip(warnings, warned, strict=True):
        assert expected in found
        assert "\n" not in found


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def one_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of a model of a billion weights, whose data is a hole in a file: it takes no room on the disk."""
    path = tmp_path_factory.mktemp("models") / "one_billion"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    model = describe(CONFIG)
    shapes = {f"{linear.prefix}.weight": linear.shape for linear in model.linears()} | model.others()
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    raw = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    return path


def test_no_weights_are_read(one_billion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    with pytest.raises(AssertionError, match=r"embed_tokens\.weight was read"):
        Checkpoint.open(one_billion).linear_tensors("model.embed_tokens")
    forecast = forecast_of(one_billion, '"*" = "w4a16g128"\n"layers.0-1.*" = "w8a16g128"\n"layers.15.down" = "w8a8"')
    assert forecast.totals.params == 1_104_218_112
    assert (one_billion / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_alike_layers_share_a_row(one_billion: Path) -> None:
    rules = '"*" = "w4a16g128"\n"layers.0-1.*" = "w8a16g128"\n"layers.15.down" = "w8a8"'
    forecast = forecast_of(one_billion, rules)
    lines = show_forecast(forecast).splitlines()
    assert [line.split()[:2] for line in lines[1:12]] == [
        ["embed", "keep"],
        *([f"layers.0-1.{kind}", "w8a16g128"] for kind in ("qkv", "o", "gate_up", "down")),
        *([f"layers.2-15.{kind}", "w4a16g128"] for kind in ("qkv", "o", "gate_up")),
        ["layers.2-14.down", "w4a16g128"],
        ["layers.15.down", "w8a8"],
        ["lm_head", "keep"],
    ]
    assert lines[12] == ""
    assert lines[13] == "A row of several layers gives the shape of one and the bytes of all."
    shown = sum(int(line.split()[-1].replace(",", "")) for line in lines[1:12])
    assert shown == sum(group.bytes for group in forecast.groups)
    # Every group apart in JSON, and the rows' names are patterns that a recipe takes.
    assert len(json.loads(forecast_json(forecast))["groups"]) == 2 + 4 * 16
    assert forecast_of(one_billion, '"layers.2-14.down" = "w8a8"').groups[4 * 2 + 4].scheme == "w8a8"


def test_the_object_has_all_of_it(tiny_llama: Path) -> None:
    found = json.loads(forecast_json(forecast_of(tiny_llama, "w2a16g32")))
    assert found.keys() == {
        *("source", "groups", "totals", "untied_bytes", "memory", "time", "warnings", "calibration")
    }
    assert found["calibration"] is None
    assert found["groups"][1] == {
        "name": "layers.0.qkv",
        "members": [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
        "scheme": "w2a16g32",
        "passes": ["rtn"],
        "shape": [128, 64],
        # Two bits and a float32 scale for 32 weights, and for each member its shape in two int64.
        "bits": 2 + 32 / 32 + 3 * 128 / (128 * 64),
        "bytes": 128 * 64 * 3 // 8 + 3 * 16,
    }
    assert found["memory"].keys() == {
        *("process_bytes", "working_bytes", "allocator_bytes", "mapped_bytes", "library_bytes")
    }
    assert found["time"].keys() == {"compute_seconds", "read_bytes", "written_bytes", "rates", "text_rates"}
    assert len(found["warnings"]) == 1
