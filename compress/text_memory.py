"""How much memory pressing with text needs on a CPU, from shapes alone.

T tokens in rows, at most B of them in a batch; H hidden, I intermediate, Q and K columns of queries and of keys; for a
fused group n = R x C numbers and its inputs' gram of C x C. Numbers are float32 throughout. With GPTQ's `correct` and
with `round` the source runs beside, and what is marked * is there twice (grams and what they come
from only with the first).

Held from the first block to the last: the residual stream T H *. While a layer is pressed, beside it: the weights as
the runtime loads them, n each *; the weights of the source, in the artifact's precision, where the source has another *
or (float32) where they are rescaled; what is stored of the layer already; and, until o is done, what attention
gathered, T Q *. With `round` also T H, the layer's inputs, and what was decided for its groups, 2 n each: the weight
and its codes (and their scales). On top of these, at the highest of:

    embedding  V H *, decoded
    gathering  grams C^2 *, a product of as much, and a batch on its way: what it has come to (the last one too), C *,
               and what that is made from
    averaging  grams, copies and means, 3 C^2 *
    matching   the grams C^2 *, n, and six of C^2: damped, its factor, a copy of that for LAPACK, the difference of the
               grams, its transpose, the solution (only with `correct`)
    factoring  the grams, five of C^2 (permuted, damped, factor, inverse, the inverse's factor) and n for each of: the
               weight, matched, permuted, and its scales (and zero points, if it has any)
    descending the grams, and 9 n: the weight, matched, scales by column before and now (zero points as well), codes
               before and now, values, the slope of the loss, a product
    searching  (awq) a gram and 7 n, zero points twice more; then the layer is loaded again beside itself
    tuning     (round) for all groups of the layer together: the latents, how far they lean, what is saved for gradients
               (codes as steps, and values), and, if they may lean, averages, gradients of the step before, and codes
               before they were clamped, so 4 n or 7 n, and as much for scales; gradients and two products of the
               largest n; and for each token of the step 7 H, 3 Q + 2 K, and 7 I: saved are its input and target,
               normed inputs, sums, what attention sees and gathers (twice), and 4 I; I of these make way for 4 I of
               gradients
"""

from dataclasses import dataclass

import torch

from pressd.compress.group_plan import GroupPlan
from pressd.compress.pass_options import Awq, Gptq, Round, Smooth
from pressd.compress.plan import BlockPlan, Plan
from pressd.compress.streams import BATCH_TOKENS
from pressd.runtime.artifact.families import EMBED, LM_HEAD
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.models.config import DecoderConfig

_WIDE = torch.float32.itemsize
# What the steps hold at their highest, as the legend says.
_MATCHING_SQUARES, _FACTORING_SQUARES, _MEANS = 6, 5, 3
_SEARCHING_WEIGHTS = 7
_DECIDED = 2
_TUNING, _TUNING_LEANING, _TUNING_ONE = 4, 7, 3
# glibc's DEFAULT_MMAP_THRESHOLD_MAX.
_LARGEST_ON_HEAP = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMemory:
    """The bytes that a plan's blocks take while `rows` rows of `seq_len` tokens run through them."""

    plan: Plan
    config: DecoderConfig
    source: torch.dtype
    rows: int
    seq_len: int

    def peak_bytes(self) -> int:
        """Return the most bytes that pressing holds at once, beyond the process as it begins."""
        blocks = self.plan.blocks
        return _WIDE * self._streams() + max(self._block(block) for block in blocks if block.groups)

    def kept_bytes(self) -> int:
        """Return what the allocator may keep for reuse: as much again as is held, but for what it maps piece by piece.

        Streams and temporaries take turns on its heap and leave holes; on a model of 512 columns the two were alike.
        Where grams are larger than what glibc keeps at most on its heap, all that is as large is given back at once.
        """
        pressed = [group for group in self.plan.groups() if group.is_rounded_with_text]
        widest = max((_gram(group) for group in pressed), default=0)
        if _WIDE * widest <= _LARGEST_ON_HEAP:
            return self.peak_bytes()
        return self.peak_bytes() - _WIDE * max(self._press(group, sides=self._matched_sides) for group in pressed)

    @property
    def _sides(self) -> int:
        """One, or two where the source runs beside."""
        return 2 if self.plan.runs_source else 1

    @property
    def _matched_sides(self) -> int:
        """One, or two where a group's inputs are compared with the source's."""
        return 2 if self.plan.matches_source else 1

    @property
    def _rescales(self) -> bool:
        return any(self.plan.recipe.pass_of(kind) is not None for kind in (Awq, Smooth))

    @property
    def _batch(self) -> int:
        return min(self.rows, max(1, BATCH_TOKENS // self.seq_len)) * self.seq_len

    def _streams(self) -> int:
        begun = self.plan.recipe.pass_of(Round) is not None
        return self.rows * self.seq_len * self.config.hidden_size * (self._sides + begun)

    def _block(self, block: BlockPlan) -> int:
        numbers = sum(_size(group) for group in block.groups)
        stored = sum(group.stored_bytes(self.plan.dtype) for group in block.groups)
        cast = 0 if self.source == self.plan.dtype else numbers * self.plan.dtype.itemsize * self._sides
        (first, *_) = block.groups
        if first.group.name == EMBED:
            return cast + stored + _WIDE * numbers * self._sides
        if first.group.name == LM_HEAD:
            return cast + stored + _WIDE * self._press(first, sides=1)
        cast = max(cast, numbers * _WIDE) if self._rescales else cast
        loaded = numbers * self._sides
        highest = max(self._group(group) for group in block.groups)
        options = self.plan.recipe.pass_of(Round)
        if options is not None:
            highest = self._tuned(block, options)
        again = max(_size(group) + _gram(group) for group in block.groups) + numbers if self._rescales else 0
        return cast + stored + _WIDE * (loaded + max(highest, again))

    def _tuned(self, block: BlockPlan, options: Round) -> int:
        """Numbers held at most where groups wait, decided, for the end of the layer, and are tuned there together."""
        highest = held = scales = 0
        for group in block.groups:
            highest = max(highest, held + self._group(group))
            if group.is_rounded_with_text:
                held += _DECIDED * _size(group)
                scales += _scales(group)
        pressed = [group for group in block.groups if group.is_rounded_with_text]
        if not pressed:
            return highest
        each = _TUNING if self.plan.recipe.pass_of(Gptq) else _TUNING_LEANING
        numbers = each * sum(map(_size, pressed)) + _TUNING_LEANING * scales + _TUNING_ONE * max(map(_size, pressed))
        tokens = min(options.rows, self.rows) * self.seq_len
        return max(highest, held + scales + numbers + tokens * self._differentiated(block))

    def _differentiated(self, block: BlockPlan) -> int:
        """Numbers per token that a layer holds while gradients pass it."""
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        wide = next(group for group in block.groups if group.group.kind == "down").group.shape[1]
        return 7 * config.hidden_size + 3 * queries + 2 * keys + 7 * wide

    def _group(self, group: GroupPlan) -> int:
        kind = group.group.kind
        columns = self.config.num_heads * self.config.head_dim
        attended = self.rows * self.seq_len * columns * self._sides if kind == "o" else 0
        return attended + self._press(group, sides=self._matched_sides)

    def _press(self, group: GroupPlan, *, sides: int) -> int:
        """Numbers that gathering for a group and rounding it hold at most."""
        moving = self._batch * (self._forward(group) + 2 * sides * group.group.shape[1])
        if not group.is_rounded_with_text:
            return moving + 2 * _size(group)
        square = _gram(group)
        gathering = (sides + 1) * square + moving
        averaging = _MEANS * sides * square + 2 * sides * self._batch * group.group.shape[1]
        return max(gathering, averaging, sides * square + self._round(group, sides))

    def _round(self, group: GroupPlan, sides: int) -> int:
        size, square, zeros = _size(group), _gram(group), _has_zero_points(group)
        matched = sides - 1
        searching = (_SEARCHING_WEIGHTS + 2 * zeros) * size
        if self.plan.recipe.pass_of(Gptq) is None:
            return searching
        matching = (_MATCHING_SQUARES * square + size) * matched
        factoring = _FACTORING_SQUARES * square + (3 + matched + zeros) * size
        descending = (8 + matched + 2 * zeros) * size
        return max(matching, factoring, descending)

    def _forward(self, group: GroupPlan) -> int:
        """Numbers per token that the inputs of a group are made from."""
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        match group.group.kind:
            case "o":
                return config.hidden_size + 2 * queries + 5 * keys
            case "down":
                return config.hidden_size + 2 * group.group.shape[1]
            case _:
                return config.hidden_size


def _size(group: GroupPlan) -> int:
    rows, columns = group.group.shape
    return rows * columns


def _gram(group: GroupPlan) -> int:
    return group.group.shape[1] ** 2


def _scales(group: GroupPlan) -> int:
    specs = [spec for spec in group.specs.values() if isinstance(spec, Packed)]
    return sum(spec.out_features * (spec.in_features // (spec.group_size or spec.in_features)) for spec in specs)


def _has_zero_points(group: GroupPlan) -> bool:
    return any(isinstance(spec, Packed) and not spec.symmetric for spec in group.specs.values())
