"""The KV cache of one attention layer: buffers allocated once at full size, so that a decode step has static shapes."""

import torch


class KVCache:
    """Keys and values of the positions seen so far: k and v, [rows, n_local_kv_heads, max_seq_len, head_dim] each.

    It is not an nn.Module, because it is not part of a checkpoint. Positions that are not in use hold zeros or old
    values. A position is always written before a query attends to it. Masked positions must be finite too: their weight
    is 0, and 0 * NaN is NaN.

    first_row: `update` stores row r of its input in row first_row + r. An executor sets it while it computes a part
        of a batch.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.first_row = 0

    def __repr__(self) -> str:
        return f"KVCache(2 x {' x '.join(map(str, self.k.shape))}, {self.k.dtype}, {self.k.device})"

    def to(self, like: torch.Tensor) -> None:
        """Convert the buffers to the dtype and device of `like` (the next keys): a model may be moved at any time."""
        if self.k.dtype != like.dtype or self.k.device != like.device:
            for name in ("k", "v"):
                buffer = getattr(self, name)
                moved = torch.zeros_like(buffer, dtype=like.dtype, device=like.device)
                setattr(self, name, moved if buffer.is_meta else moved.copy_(buffer))

    def clear(self) -> None:
        """Zero the buffers. This removes NaNs, which would spread even from masked positions."""
        self.k.zero_()
        self.v.zero_()

    def expand(self, slots: list[int], ctx_len: int) -> None:
        """Copy the first `ctx_len` positions of row slots[i] to row i, for rows with the same prefix."""
        for buffer in (self.k, self.v):
            buffer[: len(slots), :, :ctx_len] = buffer[slots, :, :ctx_len]

    def update(
        self, k: torch.Tensor, v: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `k` and `v` [bsz, n_local_kv_heads, seqlen, head_dim] and return the first `ctx_len` positions.

        start_pos: position of the first new key, one int for all rows or an int64 tensor [bsz].
        Returns views of the buffers' rows from first_row on, [bsz, n_local_kv_heads, ctx_len, head_dim].
        """
        bsz, _, seqlen, _ = k.shape
        if ctx_len > self.k.shape[2]:
            raise ValueError(f"position {ctx_len - 1}, but the cache has {self.k.shape[2]}: raise max_seq_len")
        first_row, end = self.first_row, self.first_row + bsz
        if isinstance(start_pos, int):
            self.k[first_row:end, :, start_pos : start_pos + seqlen] = k
            self.v[first_row:end, :, start_pos : start_pos + seqlen] = v
        else:
            rows = torch.arange(first_row, end, device=k.device)[:, None]  # [bsz, 1]
            positions = start_pos[:, None] + torch.arange(seqlen, device=k.device)  # [bsz, seqlen]
            # If a slice separates two index tensors, torch puts their dimensions first: [bsz, seqlen, n_kv, head_dim].
            self.k[rows, :, positions] = k.transpose(1, 2)
            self.v[rows, :, positions] = v.transpose(1, 2)
        return self.k[first_row:end, :, :ctx_len], self.v[first_row:end, :, :ctx_len]
