"""Triton kernels without a GPU: interpreted in a process of their own, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pressd.runtime.kernels.catalogue import triton_modules
from pressd.runtime.kernels.variants import Variant

ROOT = Path(__file__).parents[2]
# Bytes that a program may share, by compute capability (CUDA C Programming Guide, table of technical specifications).
SHARED = {90: 227 << 10, 80: 163 << 10}
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


@pytest.mark.timeout(600)
def test_they_compute_what_references_do_when_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert ended.returncode == 0, ended.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None
    assert int(passed[1]) > 150, "the folder was not collected"


def test_every_module_of_kernels_is_among_them() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests/triton").glob("test_*.py"))
    for module in triton_modules():
        package = module.__name__.rpartition(".")[0]
        assert f"from {package} import triton" in tests, package


def variants(oldest: int) -> list[Variant]:
    found = {variant.name: variant for module in triton_modules() for variant in module.variants()}
    return [variant for variant in found.values() if variant.oldest <= oldest]


def resources(variant: Variant, capability: int) -> dict[str, int]:
    """Compile, and return registers, bytes of stack (spilt registers) and of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    assert set(variant.signature) | set(variant.constants) == set(names)
    pointers = {name for name, kind in variant.signature.items() if kind.startswith("*")}
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers | set(variant.aligned)},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))
    return {name: int(value) for name, value in found.items()} | {"shared": compiled.metadata.shared}


@pytest.mark.parametrize("variant", variants(90), ids=lambda variant: variant.name)
def test_they_compile_for_a_hopper(variant: Variant) -> None:
    check(variant, 90)


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants(80), ids=lambda variant: variant.name)
def test_they_compile_for_an_ampere(variant: Variant) -> None:
    check(variant, 80)


def check(variant: Variant, capability: int) -> None:
    used = resources(variant, capability)
    assert used["shared"] <= SHARED[capability], used
    if variant.hot and capability == 90:
        assert used["STACK"] == used["LOCAL"] == 0, f"registers are spilt: {used}"


def test_what_is_compiled_while_serving_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from pressd.runtime.kernels.compilations import Compilations

    heard: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: heard.append(facts["key"]))
    compilations = Compilations()
    for key in ("a", "b"):
        knobs.runtime.jit_post_compile_hook(key=key)
    assert (compilations.count, heard) == (2, ["a", "b"])
