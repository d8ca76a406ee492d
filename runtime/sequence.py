"""A request on its way: the tokens it has, how far they are computed, the blocks it holds. No torch."""

from dataclasses import dataclass

from pressd.runtime.request import Request


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One live request. `token_ids` is prompt plus output; `max_length` bounds it; times are monotonic seconds."""

    request: Request
    max_length: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    block_table: tuple[int, ...] = ()
    first_block: int | None = None
    scheduled_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not computed: the whole rule of scheduling is to bring this to zero."""
        return len(self.token_ids) - self.num_computed_tokens

    def give_blocks(self, blocks: tuple[int, ...]) -> None:
        """Hold `blocks`, noting whether they are one contiguous run."""
        self.block_table = blocks
        contiguous = blocks == tuple(range(blocks[0], blocks[0] + len(blocks))) if blocks else False
        self.first_block = blocks[0] if contiguous else None
