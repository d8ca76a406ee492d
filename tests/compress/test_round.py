"""Latent weights against what can be written down, tuning against a second measurement, and whole runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import same_but_the_report
from safetensors.torch import load_file
from torch import Tensor

from pressd.compress import compress
from pressd.compress.block_work import BlockWork
from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import Clock
from pressd.compress.decision import Decision
from pressd.compress.grid import Grid, fit
from pressd.compress.pass_options import Gptq, Round
from pressd.compress.passes.round import LatentWeight, can_be_learnt, sign_descent
from pressd.compress.plan import make_plan
from pressd.compress.press import BlockDone
from pressd.compress.press_group import collect, press_group
from pressd.compress.recipe import parse_recipe
from pressd.compress.streams import Lane, LayerPass, Stream, open_streams
from pressd.compress.tune_layer import tune
from pressd.runtime.artifact.manifest import read_manifest
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.models import decoder_config
from pressd.runtime.models.loading import GROUP_KINDS

CPU = torch.device("cpu")
SCHEMES = ("w4a16g32", "w4a16g32-asym", "w3a16", "w8a8")
ROWS, LENGTH = 6, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_of(scheme: str, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Grid:
    spec = parse_scheme(scheme).spec((weight.size(0), weight.size(1)))
    assert isinstance(spec, Packed)
    return fit(weight, spec, dtype)


@pytest.mark.parametrize("leans", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_begins_with_the_codes_it_was_given(scheme: str, leans: bool) -> None:
    weight = random(7, 96)
    grid = grid_of(scheme, weight)
    nearest = grid.by_column().codes(weight)
    bits = grid.spec.bits
    anything = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), nearest.shape, generator=torch.Generator()).float()
    for codes in (nearest, anything):  # also such as GPTQ chooses, far from the weight
        latent = LatentWeight(weight, grid, codes, leans=leans)
        found, rounded = latent.rounded()
        assert torch.equal(rounded, codes)
        assert torch.equal(found.scale, grid.scale)
        assert found.zero_point is grid.zero_point
        # The value lets a gradient through by adding a difference, which is exact for neighbouring floats (Sterbenz).
        torch.testing.assert_close(latent.value().detach(), grid.by_column().values(codes), rtol=2**-22, atol=2**-22)
        assert latent.parameters.keys() == ({"lean", "stretch"} if leans else {"stretch"})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_formula(scheme: str) -> None:
    """d value / d stretch = (code - zero) x scale, by group; d value / d lean = scale, or 0 past the ends."""
    weight, slope = random(5, 64), random(5, 64, seed=1)
    grid = grid_of(scheme, weight)
    codes = grid.by_column().codes(weight)
    latent = LatentWeight(weight, grid, codes, leans=True)
    least, most = -(2 ** (grid.spec.bits - 1)), 2 ** (grid.spec.bits - 1) - 1
    with torch.no_grad():
        # The first column is pushed past the end of the range that is nearer.
        latent.lean.view(5, 64)[:, 0] = torch.where(codes[:, 0] < 0, -300.0, 300.0)
    (latent.value() * slope).sum().backward()
    moved = codes.clone()
    moved[:, 0] = torch.where(codes[:, 0] < 0, float(least), float(most))
    groups = grid.scale.size(1)
    expected = (slope * grid.by_column().values(moved)).double().view(5, groups, -1).sum(-1)
    assert latent.stretch.grad is not None
    assert latent.lean.grad is not None
    # A sum of at most 64 products of float32, of some units each: 64 x 2^-24 x 10 is 4e-5.
    torch.testing.assert_close(latent.stretch.grad.double(), expected, rtol=1e-5, atol=1e-4)
    by_lean = slope * grid.by_column().scale
    by_lean[:, 0] = 0
    torch.testing.assert_close(latent.lean.grad.view(5, 64), by_lean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_descent_lowers_a_quadratic_loss(scheme: str, dtype: torch.dtype) -> None:
    """Outputs for inputs of few directions, which rounding to nearest ignores."""
    weight, x = random(12, 64).to(dtype).float(), random(200, 8, seed=2) @ random(8, 64, seed=3)
    grid = grid_of(scheme, weight, dtype)
    codes = grid.by_column().codes(weight)
    latent = LatentWeight(weight, grid, codes, leans=True)
    wanted = x @ weight.T

    def loss(_: int = 0) -> Tensor:
        return torch.nn.functional.mse_loss(x @ latent.value().T, wanted)

    before = float(loss().detach())
    sign_descent(loss, [latent], steps=100, rate=1 / 100)
    after = float(loss().detach())
    assert after < 0.5 * before
    found, moved = latent.rounded()
    assert torch.equal(found.scale.to(dtype).float(), found.scale)  # as it can be stored
    assert torch.equal(moved, moved.round())
    assert -(2 ** (grid.spec.bits - 1)) <= float(moved.min()) <= float(moved.max()) < 2 ** (grid.spec.bits - 1)
    stored = torch.nn.functional.mse_loss(x @ found.by_column().values(moved).T, wanted)
    assert float(stored) == pytest.approx(after, rel=1e-3)


def test_nothing_moves_out_of_bounds() -> None:
    weight = random(4, 64)
    grid = grid_of("w8a16g32", weight)
    codes = grid.by_column().codes(weight)
    latent = LatentWeight(weight, grid, codes, leans=True)
    # A thousand steps of 1 (and of 0.3) up, without bounds.
    sign_descent(lambda _: -latent.value().abs().sum() - latent.value().sum(), [latent], steps=1000, rate=1.0)
    found, moved = latent.rounded()
    assert float(latent.lean.detach().abs().max()) <= 1
    assert float(latent.stretch.detach().abs().max()) <= 0.5
    assert float((moved - codes).abs().max()) <= 2  # a whole step, from up to half a step away
    # Half as large again, and what bfloat16 rounds.
    assert float((found.scale / grid.scale).max()) <= 1.5 * (1 + 2**-8)


@pytest.mark.parametrize(
    ("scheme", "learnt"), [("w4a16g32", True), ("w8a8", True), ("fp8", False), ("fp8-block", False)]
)
def test_floats_and_blocks_are_not_learnt(scheme: str, learnt: bool) -> None:
    assert can_be_learnt(grid_of(scheme, random(128, 256)).spec) == learnt


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The first layer of a model after its groups were rounded, before it is tuned."""

    layer: LayerPass
    work: BlockWork
    inputs: list[Tensor]
    targets: Sequence[Stream]
    decisions: dict[str, Decision]
    leans: bool

    def tuned(self, **options: Any) -> tuple[dict[str, Decision], float]:
        chosen = Round(**({"use": "round", "steps": 30, "rows": 3} | options))
        return tune(self.layer, self.inputs, self.targets, self.decisions, chosen, 5, leans=self.leans)

    @torch.no_grad()
    def error(self, decisions: dict[str, Decision]) -> float:
        """The squared error of what would be stored, as it would be served."""
        for decision in decisions.values():
            decision.store(self.work)
        for stream, x in zip(self.layer.streams, self.inputs, strict=True):
            stream.x = x
        for kind in GROUP_KINDS:
            self.layer.settle(kind)
            self.layer.advance(kind)
        pairs = zip(self.layer.streams, self.targets, strict=True)
        return sum(float((ours.x - theirs.x).double().square().sum()) for ours, theirs in pairs)


@torch.no_grad()
def begin(source: Path, schemes: str = '"*" = "w3a16g32"', quantise: str = "rtn") -> Begun:
    checkpoint = Checkpoint.open(source)
    passes = "".join(f'[[pass]]\nuse = "{name}"\n' for name in (quantise, "round"))
    plan = make_plan(checkpoint, parse_recipe(f"{passes}[scheme]\n{schemes}\n", "test"))
    config = decoder_config(checkpoint)
    block = next(block for block in plan.blocks if block.block.name == "layers.0")
    lane = Lane.open(config, CPU, torch.float32, LENGTH)
    ids = torch.randint(0, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

    def layer_of() -> tuple[LayerPass, BlockWork]:
        work = BlockWork.begun(checkpoint, block, plan.dtype)
        streams = open_streams(ids, [lane], checkpoint.tensor("model.embed_tokens.weight"))
        return LayerPass(config, 0, work, streams), work

    (layer, work), (theirs, _) = layer_of(), layer_of()
    inputs = [stream.x for stream in layer.streams]
    decisions = {}
    for kind in GROUP_KINDS:
        group, clock = work.group(kind), Clock()
        decided = press_group(work, group, collect(layer.inputs(kind), 1, group, clock), plan, clock)
        if isinstance(decided, Decision):
            decisions[kind] = decided
        layer.settle(kind)
        layer.advance(kind)
        theirs.advance(kind)
    leans = plan.recipe.pass_of(Gptq) is None
    return Begun(layer=layer, work=work, inputs=inputs, targets=theirs.streams, decisions=decisions, leans=leans)


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with biases in qkv."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=None,
    )
    path = tmp_path_factory.mktemp("models") / "tiny_qwen2"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("tiny_llama", "w3a16g32"),
        ("tiny_llama", "w4a16g32-asym"),
        ("tiny_llama", "w8a8"),
        ("tiny_qwen2", "w3a16g32"),
        ("tiny_qwen2", "w8a8"),
    ],
)
def test_a_tuned_layer_is_as_much_better_as_it_says(model: str, scheme: str, request: pytest.FixtureRequest) -> None:
    begun = begin(request.getfixturevalue(model), f'"*" = "{scheme}"')
    tuned, part = begun.tuned(steps=120)
    assert part < 1
    before, after = begun.error(begun.decisions), begun.error(tuned)
    # Both are sums of squares of the same differences; what is served sums in another order, and errors are no less
    # than a thousandth of the outputs (8 bits), which float32 knows to 1e-6: their squares agree within 2e-3.
    assert part == pytest.approx(after / before, rel=2e-3)
    assert all(tuned[kind].weight is begun.decisions[kind].weight for kind in GROUP_KINDS)
    # Gradients come to every row: those of queries, keys and values alike.
    for kind in GROUP_KINDS:
        moved = tuned[kind].quantised.grid.scale != begun.decisions[kind].quantised.grid.scale
        assert float(moved.any(1).float().mean()) > 0.9


def test_what_is_not_better_is_not_taken(tiny_llama: Path) -> None:
    begun = begin(tiny_llama, '"*" = "w8a16g32"')
    tuned, part = begun.tuned(rate=1.0, steps=3)  # whole steps of 8 bits, anywhere
    assert part == 1
    assert tuned.keys() == begun.decisions.keys()
    assert all(tuned[kind] is begun.decisions[kind] for kind in tuned)


def test_codes_of_gptq_stay(tiny_llama: Path) -> None:
    begun = begin(tiny_llama, quantise="gptq")
    tuned, part = begun.tuned()
    assert part < 1
    assert part == pytest.approx(begun.error(tuned) / begun.error(begun.decisions), rel=2e-3)
    pairs = [(tuned[kind].quantised, begun.decisions[kind].quantised) for kind in GROUP_KINDS]
    assert all(torch.equal(one.codes, other.codes) for one, other in pairs)
    assert not any(torch.equal(one.grid.scale, other.grid.scale) for one, other in pairs)


def test_what_cannot_be_learnt_is_left(tiny_llama: Path) -> None:
    begun = begin(tiny_llama, '"*" = "fp8a16"\n"layers.*.o" = "keep"\n"layers.*.qkv" = "w2a16g32"')
    tuned, part = begun.tuned()
    assert part < 1
    assert list(tuned) == ["qkv"]
    assert tuned["qkv"] is not begun.decisions["qkv"]
    nothing = begin(tiny_llama, '"*" = "fp8"\n"layers.1.qkv" = "w4a16g32"')
    assert nothing.tuned() == ({}, 1)


def test_a_manifest_names_round_where_something_was_tuned(tiny_llama: Path, tmp_path: Path) -> None:
    press(tiny_llama, tmp_path / "out", ROUND + '"layers.*.o" = "fp8"\n"layers.*.down" = "keep"\n')
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    for group in manifest.plan:
        is_tuned = group.scheme == "w4a16g32"
        assert ("round" in group.passes) == is_tuned
        assert any(note.startswith("round: ") for note in group.notes) == is_tuned


def test_round_without_anything_to_learn_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass 'round' has nothing to do: no group of the layers is stored as plain"):
        press(tiny_llama, tmp_path / "out", ROUND.replace("w4a16g32", "fp8"))


ROUND = '[[pass]]\nuse = "rtn"\n[[pass]]\nuse = "round"\nsteps = 20\nrows = 3\n[scheme]\n"*" = "w4a16g32"\n'


def press(source: Path, out: Path, text: str = ROUND, **options: Any) -> None:
    ids = torch.randint(0, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    rows = CalibrationRows(name="random", text_sha256="a", seed=1, ids=ids)
    compress(source, parse_recipe(text, "test"), out, rows=rows, **options)


def test_two_runs_write_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        press(tiny_llama, tmp_path / name)
    same_but_the_report(tmp_path / "one", tmp_path / "other")


def test_a_run_is_taken_up(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(done: BlockDone) -> None:
        if done.block == "layers.0":
            raise KeyboardInterrupt

    (tmp_path / "made").mkdir()
    with pytest.raises(KeyboardInterrupt):
        press(tiny_llama, tmp_path / "made/out", progress=stop)
    told: list[BlockDone] = []
    press(tiny_llama, tmp_path / "made/out", resume=True, progress=told.append)
    assert [block.was_done for block in told] == [True, True, False, False]
    press(tiny_llama, tmp_path / "whole")
    same_but_the_report(tmp_path / "whole", tmp_path / "made/out")


def test_a_run_touches_no_more_than_it_can_learn(tiny_llama: Path, tmp_path: Path) -> None:
    kept = '"layers.*.o" = "fp8a16"\n"layers.0.down" = "keep"\n"layers.1.down" = "sparse24:w4a16"\n'
    press(tiny_llama, tmp_path / "tuned", ROUND + kept)
    compress(tiny_llama, parse_recipe(f'[scheme]\n"*" = "w4a16g32"\n{kept}', "test"), tmp_path / "plain")
    tuned, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "plain"))
    assert tuned.keys() == plain.keys()
    moved = {name.rpartition(".")[0] for name in tuned if not torch.equal(tuned[name], plain[name])}
    learnt = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert moved == {f"model.layers.{index}.{name}" for index in (0, 1) for name in learnt}
    manifest = read_manifest(tmp_path / "tuned")
    assert manifest is not None
    noted = {group.name for group in manifest.plan if any(note.startswith("round: 0.") for note in group.notes)}
    assert {f"layers.{index}.{kind}" for index in (0, 1) for kind in ("qkv", "gate_up")} <= noted
