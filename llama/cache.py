"""The keys and values of past positions: fixed-size buffers with one `update`."""

import torch
from torch import nn


class KVCache(nn.Module):
    """Keys and values of one layer, [max_batch_size, n_local_kv_heads, max_seq_len, head_dim] each.

    Slots are written at absolute positions. Old ones may stay: whoever attends says how many positions it may see,
    and a position is always written before it is seen.
    """

    k: torch.Tensor
    v: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def extra_repr(self) -> str:
        return f"2 x {' x '.join(map(str, self.k.shape))}, {self.k.dtype}"

    def clear(self) -> None:
        """Forget everything: a NaN would otherwise reach other rows, as its weight of 0 does not silence it."""
        self.k.zero_()
        self.v.zero_()

    def spread(self, slots: list[int], ctx_len: int) -> None:
        """Make row i a copy of what row slots[i] holds of the first `ctx_len` positions, for rows that begin alike."""
        for buffer in (self.k, self.v):
            buffer[: len(slots), :, :ctx_len] = buffer[slots, :, :ctx_len]

    def update(
        self, k: torch.Tensor, v: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, first_row: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `k` and `v` [bsz, n_local_kv_heads, seqlen, head_dim] and return the first `ctx_len` positions.

        start_pos: position of the first new key, one int for all rows or an int64 tensor [bsz].
        Returns views of the buffers' rows from first_row on, [bsz, n_local_kv_heads, ctx_len, head_dim].
        """
        bsz, _, seqlen, _ = k.shape
        end = first_row + bsz
        if isinstance(start_pos, int):
            self.k[first_row:end, :, start_pos : start_pos + seqlen] = k
            self.v[first_row:end, :, start_pos : start_pos + seqlen] = v
        else:
            rows = torch.arange(first_row, end, device=k.device)[:, None]  # [bsz, 1]
            positions = start_pos[:, None] + torch.arange(seqlen, device=k.device)  # [bsz, seqlen]
            # Two index tensors around a slice move to the front: the target is [bsz, seqlen, n_kv, head_dim].
            self.k[rows, :, positions] = k.transpose(1, 2)
            self.v[rows, :, positions] = v.transpose(1, 2)
        return self.k[first_row:end, :, :ctx_len], self.v[first_row:end, :, :ctx_len]
