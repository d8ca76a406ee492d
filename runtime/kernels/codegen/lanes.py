"""Arithmetic on vectors of a fixed number of lanes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen.target import Vectors
from pressd.runtime.kernels.codegen.writer import BF16, F16, F32, I8, I16, I32, Function, Value

# Types that are loaded and stored as floats; in registers they are float32.
STORED: dict[torch.dtype, ir.Type] = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
ROUND = 12582912.0  # 1.5 * 2^23: between 2^23 and 2^24 there are whole numbers alone


class Lanes:
    """Writes vector instructions of `width` lanes, a power of two, into a function."""

    def __init__(self, function: Function, vectors: Vectors, width: int) -> None:
        self.f, self.vectors, self.width = function, vectors, width
        self.floats = ir.VectorType(F32, width)
        self.ints = ir.VectorType(I32, width)

    # Constants and single values in every lane.

    def constant(self, value: float) -> Value:
        return ir.Constant(self.floats, [value] * self.width)

    def integer(self, value: int) -> Value:
        return ir.Constant(self.ints, [value] * self.width)

    def splat(self, scalar: Value) -> Value:
        kind = ir.VectorType(scalar.type, self.width)
        first = self.f.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return self.f.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    # Memory.

    def load(self, pointer: Value, dtype: torch.dtype, align: int = 1) -> Value:
        """Load values of a type as float32."""
        builder = self.f.builder
        if dtype == torch.bfloat16:
            half = self.f.load(ir.VectorType(I16, self.width), pointer, align)
            return builder.bitcast(builder.shl(builder.zext(half, self.ints), self.integer(16)), self.floats)
        stored = self.f.load(ir.VectorType(STORED[dtype], self.width), pointer, align)
        return stored if dtype == torch.float32 else builder.fpext(stored, self.floats)

    def rounded(self, value: Value, dtype: torch.dtype) -> Value:
        """Round float32 to a type, to nearest even."""
        kind = ir.VectorType(STORED[dtype], self.width)
        return value if dtype == torch.float32 else self.f.builder.fptrunc(value, kind)

    def store(self, value: Value, pointer: Value, dtype: torch.dtype) -> None:
        """Store float32 in a type."""
        self.f.store(self.rounded(value, dtype), pointer)

    def store_first(self, count: Value, value: Value, pointer: Value, dtype: torch.dtype) -> None:
        """Store the first `count` lanes (i64)."""
        vector = self.rounded(value, dtype)
        element = vector.type.element
        whole = self.f.allocate(vector.type)
        self.f.store(vector, whole, 64)
        with self.f.loop(0, count) as index:
            offset = self.f.mul(index, dtype.itemsize)
            self.f.store(self.f.load(element, self.f.at(whole, offset)), self.f.at(pointer, offset))

    # Arithmetic.

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.f.intrinsic(f"llvm.fma.v{self.width}f32", self.floats, a, b, c)

    def add(self, a: Value, b: Value) -> Value:
        return self.f.builder.fadd(a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return self.f.builder.fsub(a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.f.builder.fmul(a, b)

    def div(self, a: Value, b: Value) -> Value:
        return self.f.builder.fdiv(a, b)

    def abs(self, a: Value) -> Value:
        return self.f.intrinsic(f"llvm.fabs.v{self.width}f32", self.floats, a)

    def larger(self, a: Value, b: Value) -> Value:
        """Return the larger of two; b where one is no number."""
        return self.f.builder.select(self.f.builder.fcmp_ordered(">", a, b), a, b)

    def smaller(self, a: Value, b: Value) -> Value:
        """Return the smaller of two; b where one is no number."""
        return self.f.builder.select(self.f.builder.fcmp_ordered("<", a, b), a, b)

    def whole(self, a: Value) -> Value:
        """Round to whole numbers, half to even."""
        return self.f.intrinsic(f"llvm.roundeven.v{self.width}f32", self.floats, a)

    def to_ints(self, a: Value) -> Value:
        return self.f.builder.fptosi(a, self.ints)

    def to_floats(self, a: Value) -> Value:
        return self.f.builder.sitofp(a, self.floats)

    def to_bytes(self, a: Value) -> Value:
        return self.f.builder.trunc(a, ir.VectorType(I8, self.width))

    def dot_bytes(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """Add to each lane the product of four unsigned with four signed bytes, exactly."""
        name = f"llvm.x86.avx512.vpdpbusd.{self.width * 32}"
        return self.f.intrinsic(name, self.ints, total, unsigned, signed)

    def dot_pairs(self, total: Value, a: Value, b: Value) -> Value:
        """Add to each lane the product of two pairs of bfloat16 [2 width], summed in float32."""
        name = f"llvm.x86.avx512bf16.dpbf16ps.{self.width * 32}"
        return self.f.intrinsic(name, self.floats, total, a, b)

    def exp(self, a: Value) -> Value:
        """Return e^a to 2 ulp (Cody and Waite's reduction, a polynomial of degree 6); below -87 it is e^-87."""
        # In this order what is no number stays none.
        a = self.larger(self.constant(-87.0), self.smaller(self.constant(88.0), a))
        steps = self.whole(self.mul(a, self.constant(1.4426950408889634)))
        rest = self.fma(steps, self.constant(-0.693145751953125), a)
        rest = self.fma(steps, self.constant(-1.428606820309417e-06), rest)
        result = self.constant(1 / 720)
        for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            result = self.fma(result, rest, self.constant(factor))
        power = self.f.builder.shl(self.f.builder.add(self.to_ints(steps), self.integer(127)), self.integer(23))
        return self.mul(result, self.f.builder.bitcast(power, self.floats))

    # Across lanes.

    def sum(self, a: Value) -> Value:
        """Return the sum of all lanes, in pairs."""
        return self._fold(a, self.f.builder.fadd if a.type == self.floats else self.f.builder.add)

    def largest(self, a: Value) -> Value:
        return self._fold(a, self.larger)

    def folded(self, a: Value, step: int, combine: Callable[[Value, Value], Value]) -> Value:
        """Combine lanes that lie multiples of `step` apart, and keep what comes out in each of them."""
        distance = self.width // 2
        while distance >= step:
            a = combine(a, self._part(a, [lane ^ distance for lane in range(self.width)]))
            distance //= 2
        return a

    def sums(self, vectors: list[Value]) -> Value:
        """Return a vector of the sums of as many vectors as it has lanes: a transposition that adds."""
        order = self._halved([(lane, [lane] * self.width) for lane in range(self.width)])
        placed = [vectors[0]] * self.width
        for lane, source in enumerate(order[0][1]):
            placed[source] = vectors[lane]
        return self._halved([(vector, [0] * self.width) for vector in placed], self._halves_added)[0][0]

    def transposed(self, rows: list[Value]) -> list[Value]:
        """Transpose a square of as many vectors as they have lanes, of 32 bits each."""
        distance = self.width // 2
        while distance:
            swapped = list(rows)
            for index in range(self.width):
                if not index & distance:
                    a, b = rows[index], rows[index + distance]
                    low = [lane if not lane & distance else lane - distance + self.width for lane in range(self.width)]
                    high = [lane + distance for lane in low]
                    swapped[index] = self.f.builder.shuffle_vector(a, b, self._mask(low))
                    swapped[index + distance] = self.f.builder.shuffle_vector(a, b, self._mask(high))
            rows, distance = swapped, distance // 2
        return rows

    def _halved(self, parts: list[tuple[Any, list[int]]], combine: Any = None) -> list[tuple[Any, list[int]]]:
        """Combine neighbours until one is left; each is a vector and, by lane, whose sum it is a part of.

        A step keeps half of the lanes of each: across parts of 128 bits while runs are longer, then within them.
        """
        length = self.width
        while length > 1:
            low = self._kept_lanes(length)
            high = [lane + length // 2 for lane in low]
            combined = []
            for (a, whose_a), (b, whose_b) in zip(parts[::2], parts[1::2], strict=True):
                whose = [(whose_a + whose_b)[lane] for lane in low]
                combined.append((None if combine is None else combine(a, b, low, high), whose))
            parts, length = combined, length // 2
        return parts

    def _kept_lanes(self, length: int) -> list[int]:
        """Lanes of two vectors, side by side, that hold the first halves of runs of `length`."""
        both = range(2 * self.width)
        firsts = [lane for lane in both if lane % length < length // 2]
        if length > 4:
            return firsts
        # Within 128 bits: two lanes of the one, two of the other.
        middle = self.width // 2
        pairs = [firsts[start : start + 2] for start in range(0, self.width, 2)]
        return [lane for a, b in zip(pairs[: middle // 2], pairs[middle // 2 :], strict=True) for lane in (*a, *b)]

    def _halves_added(self, a: Value, b: Value, low: list[int], high: list[int]) -> Value:
        return self.add(*(self.f.builder.shuffle_vector(a, b, self._mask(lanes)) for lanes in (low, high)))

    def _mask(self, lanes: Iterable[int]) -> Value:
        chosen = list(lanes)
        return ir.Constant(ir.VectorType(I32, len(chosen)), chosen)

    def _fold(self, a: Value, combine: Callable[[Value, Value], Value]) -> Value:
        width = self.width
        while width > 1:
            half = width // 2
            low, high = (self._part(a, range(start, start + half)) for start in (0, half))
            a, width = combine(low, high), half
        return self.f.builder.extract_element(a, ir.Constant(I32, 0))

    def _part(self, a: Value, lanes: Iterable[int]) -> Value:
        return self.f.builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined), self._mask(lanes))


def width_for(vectors: Vectors, size: int) -> int:
    """Return the most lanes that divide `size` values."""
    width = vectors.width
    while size % width:
        width //= 2
    return width
