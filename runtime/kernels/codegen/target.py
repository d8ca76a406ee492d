"""What the machine's vector units can do, and LLVM's idea of it."""

import functools
from dataclasses import dataclass

import llvmlite.binding as llvm

# What 512-bit code needs, and 256-bit code: dot products of bytes, and all that stands around them.
AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"})
AVX2 = frozenset({"avx2", "fma", "f16c"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Vectors of `width` 32-bit lanes in `registers` registers; `bf16_dot`: products of bfloat16 pairs are there."""

    width: int
    registers: int
    cpu: str
    features: str
    bf16_dot: bool = False

    @property
    def name(self) -> str:
        return "avx512-vnni" if self.width == 16 else "avx-vnni"


@functools.cache
def machine_vectors() -> Vectors | None:
    """Return the widest vectors of this machine that kernels can be written for; None if it has no VNNI."""
    _initialise()
    try:
        features = dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know how to ask this kind of processor
        return None
    return vectors_of(llvm.get_host_cpu_name(), features)


def vectors_of(cpu: str, features: dict[str, bool]) -> Vectors | None:
    """Return the vectors of a machine that LLVM describes so."""
    present = {name for name, is_there in features.items() if is_there}
    flat = ",".join(f"{'+' if is_there else '-'}{name}" for name, is_there in sorted(features.items()))
    if present >= AVX512:
        return Vectors(width=16, registers=32, cpu=cpu, features=flat, bf16_dot="avx512bf16" in present)
    if present >= AVX2 and "avxvnni" in present:
        return Vectors(width=8, registers=16, cpu=cpu, features=flat)
    return None


def target_machine(vectors: Vectors) -> llvm.TargetMachine:
    """Return LLVM's code generator for these vectors."""
    _initialise()
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(
        cpu=vectors.cpu, features=vectors.features, opt=3, reloc="pic", codemodel="jitdefault"
    )


@functools.cache
def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
