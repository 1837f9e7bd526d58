"""`Source`, the description of a model that readers return and writers accept, for all formats."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llama.checkpoint.layout import OUTPUT
from llama.checkpoint.tensor_checks import is_finite
from llama.params import ModelArgs

LLAMA3_VOCAB = 128_000  # a vocabulary of at least this size is Llama 3's


class ConvertError(ValueError):
    """The conversion is not possible. The message is one line with the reason and what to do instead."""


@dataclass
class Source:
    """A model under Meta's names, whose weights are read from their files only when needed.

    params: the keys of params.json, including vocab_size.
    tensors: Meta's name -> a function that reads the full (undivided) tensor. Tied models have no output.weight.
    files: the tokenizer's files, name -> content.
    dtypes: the stored dtype of each tensor, which dtype "auto" keeps; bfloat16 for quantized tensors.
    embedding_axis: the axis along which Meta's shards divide the embedding, 0 (rows, Llama 3) or 1 (columns, Llama 2).
        -1, for a source that is not divided, selects the axis that Meta's code for the model expects.
    max_positions: the longest context that the model was trained for, 0 if unknown.
    notes: what the user should know about the result, a line each.
    """

    params: dict[str, Any]
    tensors: dict[str, Callable[[], torch.Tensor]]
    files: dict[str, bytes]
    dtypes: dict[str, torch.dtype]
    embedding_axis: int = -1
    max_positions: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.embedding_axis == -1:
            is_llama3 = self.params["vocab_size"] >= LLAMA3_VOCAB or self.args.use_scaled_rope
            self.embedding_axis = 0 if is_llama3 or OUTPUT not in self.tensors else 1

    @property
    def args(self) -> ModelArgs:
        return ModelArgs(**self.params)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor in `dtype`. Raises ConvertError for NaN, infinity, and numbers beyond the range of `dtype`."""
        tensor = self.tensors[name]()
        if not is_finite(tensor):
            raise ConvertError(f"{name} holds NaN or infinite numbers: fetch the file again")
        if tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            if not is_finite(tensor):
                raise ConvertError(
                    f"{name} holds numbers beyond {str(dtype)[6:]}'s range: use --dtype bfloat16 or float32"
                )
        return tensor


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, copied only if it is not contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
