"""fairscale's model-parallel layers, each with this rank's part of the weight.

fairscale's own constructors first allocate the weight of the undivided model. These do not, and with one rank they
compute without fairscale's groups.
"""

from typing import cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import model_parallel_is_initialized
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn

from llama.parallel.groups import model_parallel

INIT_STD = 0.02  # of a new model's weights, as in GPT-2 and Llama's successors


class LocalLayer(nn.Module):
    """Mixin that must precede one of fairscale's classes. Its repr shows the shape of this rank's weight.

    `local_forward` is the forward if there are no groups.
    """

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.get_parameter("weight").shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x) if model_parallel_is_initialized() else self.local_forward(x)
        return y

    def local_forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.get_parameter("weight"), cast(torch.Tensor | None, self.bias))


class ColumnLinear(LocalLayer, ColumnParallelLinear):
    """x @ weight.T with the output features split: [.., in] -> [.., local_out], or [.., out] when gathered."""

    def __init__(self, weight: torch.Tensor, gather_output: bool = False):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)
        self.gather_output = gather_output
        self.output_size_per_partition, self.in_features = weight.shape
        self.out_features = self.output_size_per_partition * model_parallel()[1]


class RowLinear(LocalLayer, RowParallelLinear):
    """x @ weight.T with the input features split, summed over the ranks: [.., local_in] -> [.., out]."""

    def __init__(self, weight: torch.Tensor):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)
        self.input_is_parallel = True
        self.out_features, self.input_size_per_partition = weight.shape
        self.in_features = self.input_size_per_partition * model_parallel()[1]


class LocalEmbedding(LocalLayer):
    """Rows of a table: [bsz, seqlen] -> [bsz, seqlen, dim]."""

    def __init__(self, vocab_size: int, dim: int, weight: torch.Tensor):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight)
        self.num_embeddings, self.embedding_dim = vocab_size, dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False

    def local_forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight)


class VocabEmbedding(LocalEmbedding, VocabParallelEmbedding):
    """A table split on the vocabulary, as in Llama 3's files."""

    def __init__(self, vocab_size: int, dim: int):
        rank, world_size = model_parallel()
        local_vocab = vocab_size // world_size
        super().__init__(vocab_size, dim, init_weight((local_vocab, dim), 0))
        self.vocab_start_index, self.vocab_end_index = rank * local_vocab, (rank + 1) * local_vocab


class DimEmbedding(LocalEmbedding, ParallelEmbedding):
    """A table split on dim, as in Llama 2's files."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__(vocab_size, dim, init_weight((vocab_size, dim // model_parallel()[1]), 1))


def init_weight(shape: tuple[int, int], axis: int, copies: int = 1) -> torch.Tensor:
    """This rank's part of a new random weight, on torch's default device and in its default dtype.

    The undivided weight is drawn, so that a seed gives the same model for any number of ranks. shape: of the part.
    axis: on which ranks split the weight. copies: how many neighbouring ranks hold the same part.
    """
    rank, world_size = model_parallel()
    parts = world_size // copies
    full = list(shape)
    full[axis] *= parts
    if (part := torch.empty(shape)).is_meta:  # on meta, some operators would import sympy
        return part
    weight = torch.empty(full).normal_(0, INIT_STD)
    return weight if parts == 1 else part.copy_(weight.chunk(parts, dim=axis)[rank // copies])


def share_storage(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy weights [n, k] into one storage, in adjacent rows, so that one matmul can use all. Returns the copies."""
    joined = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1]).split([len(w) for w in weights])
    for copy, weight in zip(joined, weights, strict=True):
        if not weight.is_meta:
            copy.copy_(weight)
    return joined
