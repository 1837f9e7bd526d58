"""torch.manual_seed governs sampled calls, as it does with Meta's packages."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from llama import Llama

PROMPTS = ["The licence", "You may"]


def answers(llama: Llama, seed: int) -> list[str]:
    torch.manual_seed(seed)
    found = llama.text_completion(PROMPTS, temperature=1.5, top_p=1.0, max_gen_len=12)
    return [answer["generation"] for answer in found]


def test_manual_seed_repeats_a_call(build: Callable[..., Llama]) -> None:
    llama = build("mha")
    first = answers(llama, 3)
    assert first == answers(llama, 3) != answers(llama, 4)
    built_by_hand = Llama(llama.model, llama.tokenizer)
    assert answers(built_by_hand, 3) == first


def test_build_sets_the_seed_for_the_whole_program(build: Callable[..., Llama]) -> None:
    build("mha", seed=5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_a_sampled_row_without_a_seed_draws_once_and_no_other_row_does(build: Callable[..., Llama]) -> None:
    llama = build("mha")
    torch.manual_seed(2)
    torch.randint(2**63 - 1, (3,))
    expected = torch.rand(1)
    torch.manual_seed(2)
    llama.generate([[1, 5]] * 5, 2, temperature=[1.0, 0.5, 0, 0.7, 0.7], seed=[None, None, None, 4, None])
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("seed", [2**64, 10**30])
def test_a_seed_that_torch_cannot_take(seed: int, build: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed}, expected an integer from 0, below {2**64}"):
        build("mha", seed=seed)


def seeded_differently(folder: Path) -> list[list[str]]:
    llama = Llama.build(folder)
    rank = torch.distributed.get_rank()
    found = [answers(llama, 7), answers(llama, 7 + rank)]
    llama.close()
    return found


def test_rank_0_decides_where_ranks_are_seeded_differently(checkpoint: Callable[..., Path]) -> None:
    first, second = run_ranks(2, seeded_differently, checkpoint("mha"))
    assert first == second and first[0] == first[1]
