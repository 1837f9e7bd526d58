"""The KV cache of one attention layer: buffers allocated once at full size, so that a decode step has static shapes."""

from collections.abc import Sequence

import torch

Rows = slice | torch.Tensor  # an index of cache rows: a slice, which gives views, or an int64 tensor [bsz]


class KVCache:
    """Keys and values of the positions seen so far: k and v, [rows, n_local_kv_heads, max_seq_len, head_dim] each.

    It is not an nn.Module, because it is not part of a checkpoint. Positions that are not in use hold zeros or old
    values. A position is always written before a query attends to it. Masked positions must be finite too: their weight
    is 0, and 0 * NaN is NaN.

    slots: the cache row of each row of `update`'s input; None: rows 0, 1, 2, ... An executor sets it for layers that
        run as modules.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.slots: list[int] | None = None

    def __repr__(self) -> str:
        return f"KVCache(2 x {' x '.join(map(str, self.k.shape))}, {self.k.dtype}, {self.k.device})"

    def to(self, like: torch.Tensor) -> None:
        """Convert the buffers to the dtype and device of `like` (the next keys): a model may be moved at any time."""
        if self.k.dtype != like.dtype or self.k.device != like.device:
            for name in ("k", "v"):
                buffer = getattr(self, name)
                moved = torch.zeros_like(buffer, dtype=like.dtype, device=like.device)
                setattr(self, name, moved if buffer.is_meta else moved.copy_(buffer))

    def clear(self, slot: int | None = None) -> None:
        """Zero a row, or everything. This removes NaNs, which would spread even from masked positions."""
        for buffer in (self.k, self.v):
            (buffer if slot is None else buffer[slot]).zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        for buffer in (self.k, self.v):
            buffer[target, :, :length] = buffer[source, :, :length]

    def expand(self, slots: list[int], ctx_len: int) -> None:
        """Copy the first `ctx_len` positions of row slots[i] to row i, for rows with the same prefix."""
        for buffer in (self.k, self.v):
            buffer[: len(slots), :, :ctx_len] = buffer[slots, :, :ctx_len]

    def rows(self, slots: Sequence[int] | None, bsz: int) -> Rows:
        """The index of the cache rows `slots` of `bsz` rows of ids (None: the first rows): a slice if they are adjacent
        and ascending. Raises ValueError for rows that the cache does not have."""
        slots, capacity = range(bsz) if slots is None else slots, len(self.k)
        if len(slots) != bsz or not all(0 <= slot < capacity for slot in slots):
            raise ValueError(f"{bsz} rows of ids in cache rows {list(slots)}, but the cache has {capacity} rows")
        first = slots[0] if slots else 0
        if all(slot == first + i for i, slot in enumerate(slots)):
            return slice(first, first + bsz)
        return torch.tensor(slots, device=self.k.device)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `k` and `v` [bsz, n_local_kv_heads, seqlen, head_dim] and return the first `ctx_len` positions.

        start_pos: position of the first new key, one int for all rows or an int64 tensor [bsz].
        Returns the rows `slots` of the buffers, [bsz, n_local_kv_heads, ctx_len, head_dim]: views if they are adjacent
        and ascending.
        """
        rows = self.rows(self.slots, len(k))
        self.store(k, v, start_pos, ctx_len, rows)
        return self.k[rows, :, :ctx_len], self.v[rows, :, :ctx_len]

    def store(self, k: torch.Tensor, v: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, rows: Rows) -> None:
        """The first half of `update`, for any cache rows."""
        seqlen = k.shape[2]
        if ctx_len > self.k.shape[2]:
            raise ValueError(f"position {ctx_len - 1}, but the cache has {self.k.shape[2]}: raise max_seq_len")
        if isinstance(start_pos, int):
            self.k[rows, :, start_pos : start_pos + seqlen] = k
            self.v[rows, :, start_pos : start_pos + seqlen] = v
        else:
            index = row_tensor(rows, k.device)[:, None]  # [bsz, 1]
            positions = start_pos[:, None] + torch.arange(seqlen, device=k.device)  # [bsz, seqlen]
            # If a slice separates two index tensors, torch puts their dimensions first: [bsz, seqlen, n_kv, head_dim].
            self.k[index, :, positions] = k.transpose(1, 2)
            self.v[index, :, positions] = v.transpose(1, 2)


def row_tensor(rows: Rows, device: torch.device) -> torch.Tensor:
    """An index of cache rows as an int64 tensor [bsz]."""
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
