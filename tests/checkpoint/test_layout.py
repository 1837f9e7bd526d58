"""Shapes of tensors, and their slices on each rank."""

import json
from pathlib import Path

import torch

from llama import ModelArgs
from llama.checkpoint.layout import legal_world_sizes, rank_slice, tensor_shapes
from llama.checkpoint.params_json import read_params


def test_parameter_counts_are_the_published_ones() -> None:
    def count(args: ModelArgs) -> int:
        return sum(torch.Size(shape).numel() for shape in tensor_shapes(args).values())

    assert count(ModelArgs(vocab_size=32000)) == 6_738_415_616
    big = ModelArgs(8192, 80, 64, 8, 32000, multiple_of=4096, ffn_dim_multiplier=1.3)
    assert count(big) == 68_976_648_192
    assert count(ModelArgs(4096, 32, 32, 8, 128256, multiple_of=1024, ffn_dim_multiplier=1.3)) == 8_030_261_248


def test_legal_world_sizes() -> None:
    seven_b = ModelArgs(vocab_size=32000)
    assert legal_world_sizes(seven_b) == [1, 2, 4, 8, 16, 32]
    # 12 divides heads, width and vocabulary, but rank 1's queries would need KV heads 0 and 1.
    assert legal_world_sizes(ModelArgs(3072, 28, 24, 8, 128256)) == [1, 2, 4, 8]
    assert legal_world_sizes(ModelArgs(576, 30, 9, 3, 49152, multiple_of=32)) == [1, 3]


def test_every_query_head_has_its_kv_head_on_its_rank() -> None:
    args = ModelArgs(128, 2, 8, 2, 512, multiple_of=16)
    for world_size in (1, 2, 4, 8):
        for head in range(8):
            rank = head * world_size // 8
            start, stop = rank_slice("layers.0.attention.wk.weight", 32, args, rank, world_size)
            needed = head * 2 // 8
            assert start <= needed * 16 and (needed + 1) * 16 <= stop


def test_explicit_sizes(tmp_path: Path) -> None:
    """head_dim and hidden_dim, as Mistral writes them, where dim / n_heads and multiple_of give other sizes."""
    params = {
        "dim": 64,
        "n_layers": 1,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 20,
        "hidden_dim": 50,
        "vocab_size": 8,
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    args = read_params(tmp_path)
    assert (args.head_dim, args.hidden_dim) == (20, 50)
    shapes = tensor_shapes(args)
    assert shapes["layers.0.attention.wq.weight"] == (120, 64) and shapes["layers.0.attention.wo.weight"] == (64, 120)
    assert shapes["layers.0.attention.wk.weight"] == (40, 64) and shapes["layers.0.feed_forward.w2.weight"] == (64, 50)
    assert legal_world_sizes(args) == [1, 2]
