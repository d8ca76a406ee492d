"""Generated code: both widths of vectors, threads, the cache of compiled kernels, and recordings."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from generated import narrow, needs_vnni
from hypothesis import given
from hypothesis import strategies as st

from pressd.runtime.kernels import vnni_linear, vnni_lines, vnni_product, vnni_rows
from pressd.runtime.kernels.codegen import object_cache, recording
from pressd.runtime.kernels.codegen.program import optimise, write_region
from pressd.runtime.kernels.codegen.target import AVX2, AVX512, Vectors, machine_vectors, target_machine, vectors_of
from pressd.runtime.kernels.norm import cpu as norm
from pressd.runtime.kernels.registry import LinearProblem, describe_device

CPU = describe_device(torch.device("cpu"))
# The flags of a CPU whose vectors have 256 bits and VNNI: Intel's Alder Lake.
ALDER_LAKE = dict.fromkeys(("avx2", "fma", "f16c", "avxvnni", "sse4.2", "bmi2"), True)


def shape(bits: int = 4, in_features: int = 256, group_size: int | None = 64) -> vnni_product.Shape:
    return vnni_product.Shape(
        bits=bits,
        in_features=in_features,
        group_size=group_size,
        scale_dtype=torch.bfloat16,
        dtype=torch.float32,
    )


def weight(form: vnni_product.Shape, outputs: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return lines, packed scales, and the weight that they mean in float64."""
    generator = torch.Generator().manual_seed(outputs)
    half = 1 << (form.bits - 1)
    codes = torch.randint(-half, half, (outputs, form.in_features), generator=generator, dtype=torch.int8)
    scale = (torch.rand(outputs, form.groups, generator=generator) + 0.5).to(torch.bfloat16)
    lines = vnni_lines.empty(outputs, form.in_features, form.bits)
    vnni_lines.write(lines, 0, codes, form.bits)
    exact = codes.double().view(outputs, form.groups, -1) * scale.double().unsqueeze(-1)
    return lines, vnni_lines.pack_scale(scale), exact.flatten(1).numpy()


@needs_vnni
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    "form", [shape(), shape(8), shape(4, 96, None), shape(8, 160, None), shape(4, 128, 32)], ids=str
)
@pytest.mark.parametrize("threads", [1, 2])
def test_products_of_any_number_of_rows(form: vnni_product.Shape, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outputs in (1, 15, 16, 33, 200):
            lines, scale, exact = weight(form, outputs)
            for rows in (*range(18), 25, 50):
                x = torch.randn(rows, form.in_features, generator=torch.Generator().manual_seed(rows))
                quantised = vnni_rows.quantize_rows(x, form.group_size)
                y = vnni_product.multiply(quantised, lines, scale, form, outputs)
                groups = quantised.codes.double().reshape(rows, form.groups, form.group)
                groups = groups * quantised.scale.double().unsqueeze(-1)
                seen = groups.reshape(rows, form.in_features).numpy()
                # Sums of codes are exact; each group is two products and a sum in float32.
                bound = (form.groups + 2) * 2**-23 * (np.abs(seen) @ np.abs(exact).T) + 1e-30
                assert (np.abs(y.double().numpy() - seen @ exact.T) <= bound).all(), (outputs, rows)
    finally:
        torch.set_num_threads(before)


@needs_vnni
def test_nothing_is_written_beyond_the_output() -> None:
    form = shape()
    lines, scale, _ = weight(form, 33)
    x = vnni_rows.quantize_rows(torch.randn(3, form.in_features), form.group_size)
    whole = torch.full((5, 33), 7.0)
    program = vnni_product._program(form)
    assert x.sums is not None
    program.run(
        3, lines.data_ptr(), scale.data_ptr(), x.codes.data_ptr(), x.scale.data_ptr(), x.sums.data_ptr(),
        whole[1].data_ptr(), 3, 1, 33, 0, 0, 1,
    )  # fmt: skip
    assert torch.equal(whole[1:4], vnni_product.multiply(x, lines, scale, form, 33))
    assert bool((whole[[0, 4]] == 7).all())


def test_what_a_machine_has() -> None:
    assert vectors_of("generic", dict.fromkeys(AVX2, True)) is None
    assert vectors_of("generic", dict.fromkeys(AVX512 - {"avx512vnni"}, True)) is None
    wide = vectors_of("generic", dict.fromkeys(AVX512, True) | {"avx512bf16": True})
    assert wide is not None
    assert (wide.name, wide.width, wide.bf16_dot) == ("avx512-vnni", 16, True)
    small = vectors_of("alderlake", ALDER_LAKE)
    assert small is not None
    assert (small.name, small.width, small.bf16_dot) == ("avx-vnni", 8, False)
    # LLVM describes what a machine lacks, too.
    assert vectors_of("generic", dict.fromkeys(AVX512, True) | {"avx512vnni": False}) is None


def test_code_for_a_machine_with_256_bits_uses_its_instructions() -> None:
    small = vectors_of("alderlake", ALDER_LAKE)
    assert small is not None
    module = optimise(write_region(vnni_product.region(shape(), small)), small)
    assembly = target_machine(small).emit_assembly(module)
    assert "{vex}\tvpdpbusd" in assembly or "{vex} vpdpbusd" in assembly
    assert "zmm" not in assembly


def test_reasons_to_refuse() -> None:
    problem = LinearProblem(
        storage="packed_int",
        bits=4,
        group_size=64,
        activation_bits=8,
        out_features=64,
        in_features=128,
        dtype=torch.bfloat16,
    )

    def reason(**changes: object) -> str | None:
        fields = {name: getattr(problem, name) for name in problem.__slots__} | changes
        return vnni_linear.why_not(LinearProblem(**fields), CPU)

    if machine_vectors() is None:
        assert reason() == "this CPU has neither AVX-512 with VNNI nor AVX-VNNI"
        return
    assert reason() is None
    assert reason(activation_bits=16) == "serves 4- and 8-bit weights with 8-bit activations, not w4a16"
    assert reason(bits=3) == "serves 4- and 8-bit weights with 8-bit activations, not w3a8"
    assert reason(dtype=torch.float64) == "computes in float32 at most, not in torch.float64"
    assert reason(in_features=100, group_size=None) == "needs a multiple of 32 inputs, not 100"
    assert "sums up to" in str(reason(in_features=1 << 17, group_size=None))
    assert reason(in_features=1 << 17) is None
    assert "more than a tenth" in str(reason(out_features=17))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "code"
    object_cache.use(folder)
    yield folder
    object_cache.use(None)


@needs_vnni
class TestCache:
    VECTORS = Vectors(width=16, registers=32, cpu="any", features="")

    def test_gives_back_what_was_kept_for_the_same_text_and_machine(self, cache: Path) -> None:
        assert object_cache.look_up("text", self.VECTORS) is None
        object_cache.keep("text", self.VECTORS, b"machine code")
        assert object_cache.look_up("text", self.VECTORS) == b"machine code"
        assert object_cache.look_up("text ", self.VECTORS) is None
        other = Vectors(width=16, registers=32, cpu="another", features="")
        assert object_cache.look_up("text", other) is None
        assert [path.suffix for path in cache.iterdir()] == [".o"]
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    def test_damaged_files_are_compiled_again(self, cache: Path) -> None:
        object_cache.keep("text", self.VECTORS, b"machine code")
        (path,) = cache.iterdir()
        for damage in (b"", b"short", path.read_bytes()[:-1], path.read_bytes()[:-1] + b"!"):
            path.write_bytes(damage)
            assert object_cache.look_up("text", self.VECTORS) is None

    def test_a_directory_that_others_can_write_to_is_not_trusted(self, cache: Path) -> None:
        object_cache.keep("text", self.VECTORS, b"machine code")
        cache.chmod(0o777)
        assert object_cache.look_up("text", self.VECTORS) is None
        cache.chmod(0o700)
        assert object_cache.look_up("text", self.VECTORS) == b"machine code"

    def test_a_link_is_not_trusted(self, cache: Path) -> None:
        object_cache.keep("text", self.VECTORS, b"machine code")
        moved = cache.rename(cache.with_name("elsewhere"))
        cache.symlink_to(moved)
        assert object_cache.look_up("text", self.VECTORS) is None

    @pytest.mark.skipif(os.getuid() != 0, reason="takes root to make a directory somebody else's")
    def test_somebody_elses_directory_is_not_trusted(self, cache: Path) -> None:
        object_cache.keep("text", self.VECTORS, b"machine code")
        os.chown(cache, 12345, 12345)
        assert object_cache.look_up("text", self.VECTORS) is None

    def test_no_place_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        object_cache.use(tmp_path / "file" / "code")
        object_cache.keep("text", self.VECTORS, b"machine code")
        assert object_cache.look_up("text", self.VECTORS) is None
        object_cache.use(None)

    def test_a_failed_write_leaves_nothing(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path, content: bytes) -> int:
            with path.open("wb") as file:
                file.write(content[:5])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        object_cache.keep("text", self.VECTORS, b"machine code")
        assert list(cache.iterdir()) == []

    def test_kept_code_computes_the_same(self, cache: Path) -> None:
        form = shape(4, 160, 32)
        lines, scale, _ = weight(form, 40)
        x = vnni_rows.quantize_rows(torch.randn(3, 160), 32)
        vnni_product._program.cache_clear()
        first = vnni_product.multiply(x, lines, scale, form, 40)
        files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        assert files
        vnni_product._program.cache_clear()
        assert torch.equal(vnni_product.multiply(x, lines, scale, form, 40), first)
        assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files


@needs_vnni
class TestRecording:
    def body(self, x: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
        gain = self.gain
        for _ in range(steps):
            _, y = norm.add_norm(x, x, gain, 1e-5)
            assert isinstance(y, torch.Tensor)
            x, _ = norm.add_norm(y, x, gain, 1e-5)
        return [x, y]

    gain = torch.linspace(0.5, 1.5, 128)

    def test_a_replay_follows_its_input(self) -> None:
        x, arena = torch.randn(4, 128), recording.Arena()
        replay = recording.record(lambda: self.body(x), arena)
        assert replay.num_kernels == 6
        for seed in range(3):
            x.copy_(torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)))
            expected = self.body(x)
            arena.memory.fill_(255)  # NaN in every float
            replay.run()
            assert all(map(torch.equal, replay.outputs, expected))

    def test_recordings_share_memory_that_grows(self) -> None:
        arena = recording.Arena()
        small, large = torch.randn(2, 128), torch.randn(9, 128)
        first = recording.record(lambda: self.body(small), arena)
        first.run()
        size = arena.memory.numel()
        second = recording.record(lambda: self.body(large), arena)
        assert arena.memory.numel() > size
        for replay, x in ((second, large), (first, small), (second, large)):
            replay.run()
            assert all(map(torch.equal, replay.outputs, self.body(x)))

    def test_memory_is_less_than_all_tensors(self) -> None:
        x, arena = torch.randn(8, 128), recording.Arena()
        recording.record(lambda: self.body(x, steps=50), arena)
        assert arena.memory.numel() <= 6 * x.nbytes  # of 100 tensors

    def test_other_operators_are_refused(self) -> None:
        x, arena = torch.randn(4, 128), recording.Arena()
        for spoil in (lambda y: [y + 1], lambda y: [y.add_(1)], lambda y: [torch.cat([y, y])], lambda y: [y.clone()]):
            with pytest.raises(recording.NotRecordable, match="aten::"):
                recording.record(lambda spoil=spoil: spoil(self.body(x)[0]), arena)  # type: ignore[misc]
        assert recording._active is None

    def test_views_are_allowed(self) -> None:
        x, arena = torch.randn(4, 128), recording.Arena()
        replay = recording.record(lambda: [self.body(x)[0].flatten(0, -2)], arena)
        replay.run()
        assert torch.equal(replay.outputs[0], self.body(x)[0])

    def test_another_thread_is_not_recorded(self) -> None:
        x, other, arena = torch.randn(4, 128), torch.randn(4, 128), recording.Arena()

        def body() -> list[torch.Tensor]:
            thread = threading.Thread(target=self.body, args=(other,))
            thread.start()
            thread.join()
            return self.body(x)

        assert recording.record(body, arena).num_kernels == 6

    def test_threads_record_one_after_the_other(self) -> None:
        inputs = [torch.randn(rows, 128) for rows in (1, 2, 3, 4)]
        replays: dict[int, recording.Replay] = {}

        def work(number: int) -> None:
            replays[number] = recording.record(lambda: self.body(inputs[number], steps=20), recording.Arena())

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, x in enumerate(inputs):
            replays[number].run()
            assert replays[number].num_kernels == 40
            assert all(map(torch.equal, replays[number].outputs, self.body(x, steps=20)))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(1, 300)), min_size=1, max_size=25))
def test_memory_in_use_at_the_same_time_never_overlaps(spans: list[tuple[int, int, int]]) -> None:
    first, last = [start for start, _, _ in spans], [start + more for start, more, _ in spans]
    sizes = [size for *_, size in spans]
    offsets, total = recording._lay_out(first, last, sizes)
    for a in range(len(spans)):
        assert offsets[a] % recording.ALIGNMENT == 0
        assert offsets[a] + sizes[a] <= total
        for b in range(a):
            if first[a] <= last[b] and first[b] <= last[a]:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
    aligned = sum(-(-size // recording.ALIGNMENT) * recording.ALIGNMENT for size in sizes)
    assert total <= aligned


@needs_vnni
def test_narrow_vectors_are_forgotten_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = machine_vectors()
    with narrow(monkeypatch) as vectors:
        assert machine_vectors() == vectors
    assert machine_vectors() == mine
