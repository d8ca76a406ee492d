"""What passes are for, shown on a trained model in which the trouble was planted: outliers, and the way around them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows, read_calibration
from pressd.compress.evaluate import evaluate
from pressd.compress.recipe import Calibration, parse_recipe
from pressd.runtime.artifact.reader import Checkpoint

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
WEIGHTS = "model.safetensors"
LAYERS, HIDDEN = 3, 256
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def shortened(path: Path) -> dict[str, torch.Tensor]:
    """Copy the first layers of pylm to `path`, all but the weights, which are returned."""
    path.mkdir()
    for file in PYLM.glob("*.json"):
        shutil.copy(file, path)
    config = json.loads((PYLM / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (path / "config.json").write_text(json.dumps(config))
    return {
        name: tensor
        for name, tensor in load_file(PYLM / WEIGHTS).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`plain`, and `planted`: eight channels of every norm are 64 times as large and read by weights 1/64 as large.

    Both compute the same, to the bit: powers of two are exact.
    """
    root = tmp_path_factory.mktemp("models")
    tensors = shortened(root / "plain")
    save_file(tensors, root / "plain" / WEIGHTS)
    shortened(root / "planted")
    generator = torch.Generator().manual_seed(3)
    for layer in range(LAYERS):
        for norm, readers in READERS.items():
            channels = torch.randperm(HIDDEN, generator=generator)[:8]
            tensors[f"model.layers.{layer}.{norm}.weight"][channels] *= 64
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"][:, channels] /= 64
    save_file(tensors, root / "planted" / WEIGHTS)
    return {name: root / name for name in ("plain", "planted")}


def kl(source: Path, out: Path, scheme: str, pass_: str = "", rows: CalibrationRows | None = None) -> float:
    """Press with 2048 tokens, and measure on 1024 others: KL divergence from the source, mean over tokens."""
    used = f'[[pass]]\nuse = "{pass_}"\n' if pass_ else ""
    recipe = parse_recipe(f'{used}[calibration]\ntokens = 2048\nseq_len = 256\n[scheme]\n"*" = "{scheme}"\n', "recipe")
    compress(source, recipe, out, rows=rows)
    found = evaluate(out, source, tokens=1024, seq_len=256)["kl_mean"]
    assert isinstance(found, float)
    return found


def test_planting_changes_nothing(models: dict[str, Path]) -> None:
    assert evaluate(models["planted"], models["plain"], tokens=512, seq_len=256)["kl_mean"] == 0.0


@pytest.mark.parametrize(("scheme", "pass_"), [("w8a8", "smooth"), ("w4a16g128", "awq")])
def test_rescaling_takes_outliers_back(models: dict[str, Path], tmp_path: Path, scheme: str, pass_: str) -> None:
    """Of what the outliers add to the loss, at least four fifths."""
    plain = kl(models["plain"], tmp_path / "plain", scheme)
    planted = kl(models["planted"], tmp_path / "planted", scheme)
    helped = kl(models["planted"], tmp_path / "helped", scheme, pass_)
    assert planted > 2 * plain
    assert (planted - helped) / (planted - plain) >= 0.8, f"{plain=} {planted=} {helped=}"


# A token of the vocabulary that no text here has; its vector points along a channel that nothing else uses.
RARE, CHANNEL = 4095, 100


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationRows]:
    """A model in which a rare token makes inputs of qkv and gate_up that are 30 times all others; rows that hold it."""
    path = tmp_path_factory.mktemp("models") / "rare"
    tensors = shortened(path)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    embedding[:, CHANNEL] = 0
    embedding[RARE] = 0
    embedding[RARE, CHANNEL] = 100
    for layer in range(LAYERS):
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{writer}.weight"][CHANNEL] = 0
        for norm, readers in READERS.items():
            tensors[f"model.layers.{layer}.{norm}.weight"][CHANNEL] = 16
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"][:, CHANNEL] /= 64
    save_file(tensors, path / WEIGHTS)
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    rows = read_calibration(Calibration(tokens=2048, seq_len=256), Checkpoint.open(path), 1024)
    assert not bool((rows.ids == RARE).any())
    ids = rows.ids.clone()
    ids[3, 200] = ids[6, 31] = RARE
    return path, CalibrationRows(name="with a rare token", text_sha256="0" * 64, seed=0, ids=ids)


def test_a_rare_token_does_not_decide_how_all_others_are_rounded(
    rare: tuple[Path, CalibrationRows], tmp_path: Path
) -> None:
    """Static scales by largest value end at the outlier; by KL divergence, and by squared error, at all the others."""
    path, rows = rare
    found = {
        observer: kl(path, tmp_path / observer, "w8a8-static", f'static"\nobserver = "{observer}', rows)
        for observer in ("minmax", "kl", "mse")
    }
    assert not math.isnan(found["minmax"])
    assert found["kl"] < found["minmax"] / 2, found
    assert found["mse"] < found["minmax"] / 2, found
