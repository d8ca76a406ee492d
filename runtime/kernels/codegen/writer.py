"""Functions in LLVM IR, written statement by statement; what LLVM's optimiser does better is left to it.

Mutable variables are stack slots, which the optimiser turns into registers. Addresses are numbers until something is
loaded or stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
F16 = ir.HalfType()
POINTER = ir.PointerType()
VOID = ir.VoidType()


class BFloatType(ir.Type):  # type: ignore[misc]
    """bfloat16, which llvmlite has no word for."""

    null = "0.0"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


BF16 = BFloatType()
Value = Any  # of llvmlite, which has no types
Number = Any  # a Value or an int


class Slot:
    """A mutable variable."""

    def __init__(self, function: "Function", initial: Value) -> None:
        self._function = function
        self._place = function.variable(initial.type)
        self.set(initial)

    def get(self) -> Value:
        return self._function.builder.load(self._place, typ=self._place.allocated_type)

    def set(self, value: Value) -> None:
        self._function.builder.store(value, self._place)


class Function:
    """One function under construction; `arguments` are its parameters, all 64-bit integers but for pointers."""

    def __init__(self, module: ir.Module, name: str, parameters: Sequence[ir.Type], *, is_public: bool = False) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, parameters), name)
        self.function.attributes.add("nounwind")
        if not is_public:
            self.function.linkage = "internal"
        self._entry = self.function.append_basic_block("entry")
        body = self.function.append_basic_block("body")
        self.builder = ir.IRBuilder(body)
        self._entry_builder = ir.IRBuilder(self._entry)
        self._body = body
        self.arguments = self.function.args

    def finish(self) -> ir.Function:
        """End the function; it returns nothing."""
        self.builder.ret_void()
        self._entry_builder.branch(self._body)
        return self.function

    def variable(self, kind: ir.Type) -> Value:
        """Return the place of a value of its own."""
        place = self._entry_builder.alloca(kind)
        place.align = 64
        return place

    def allocate(self, kind: ir.Type) -> Value:
        """Return a pointer to memory that a call has to itself."""
        place = self.variable(kind)
        place.type = POINTER  # not to that type: llvmlite would let nothing else be stored there
        return place

    def slot(self, initial: Value) -> Slot:
        return Slot(self, initial)

    # Numbers.

    def number(self, value: Number, kind: ir.Type = I64) -> Value:
        return ir.Constant(kind, value) if isinstance(value, (int, float)) else value

    def add(self, a: Value, b: Number) -> Value:
        return self.builder.add(a, self.number(b, a.type))

    def sub(self, a: Value, b: Number) -> Value:
        return self.builder.sub(a, self.number(b, a.type))

    def mul(self, a: Value, b: Number) -> Value:
        return self.builder.mul(a, self.number(b, a.type))

    def div(self, a: Value, b: Number) -> Value:
        """Divide numbers that are not negative."""
        return self.builder.udiv(a, self.number(b, a.type))

    def rem(self, a: Value, b: Number) -> Value:
        return self.builder.urem(a, self.number(b, a.type))

    def less(self, a: Value, b: Number) -> Value:
        return self.builder.icmp_signed("<", a, self.number(b, a.type))

    def smaller(self, a: Value, b: Number) -> Value:
        """Return the smaller of two integers."""
        b = self.number(b, a.type)
        return self.builder.select(self.less(a, b), a, b)

    # Control.

    @contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """Run what is written inside for start, start + step, ... below stop."""
        builder = self.builder
        start, stop = self.number(start), self.number(stop)
        before = builder.block
        inside = builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", start, stop), inside, after)
        builder.position_at_end(inside)
        index = builder.phi(I64)
        index.add_incoming(start, before)
        yield index
        following = builder.add(index, self.number(step))
        index.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, stop), inside, after)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        with self.builder.if_else(condition) as branches:
            yield branches

    # Memory: an address is an i64, and offsets are in bytes.

    def at(self, address: Value, offset: Number = 0) -> Value:
        """Return the pointer `offset` bytes behind a pointer."""
        return self.builder.gep(address, [self.number(offset)], source_etype=I8)

    def pointer(self, address: Value) -> Value:
        return self.builder.inttoptr(address, POINTER)

    def load(self, kind: ir.Type, pointer: Value, align: int = 1) -> Value:
        return self.builder.load(pointer, align=align, typ=kind)

    def store(self, value: Value, pointer: Value, align: int = 1) -> None:
        self.builder.store(value, pointer, align=align)

    def intrinsic(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        """Call one of LLVM's own functions."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.builder.call(function, arguments)

    def prefetch(self, pointer: Value, locality: int = 3) -> None:
        flags = [ir.Constant(I32, value) for value in (0, locality, 1)]
        self.intrinsic("llvm.prefetch.p0", VOID, pointer, *flags)
