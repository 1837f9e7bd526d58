"""Servers of seeded models, shared by the tests of a worker."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.servers import Server, serving


@pytest.fixture(scope="session")
def server(checkpoint: Callable[..., Path]) -> Iterator[Server]:
    with serving(checkpoint("mha"), max_seq_len=160, max_batch_size=4) as running:
        yield running
