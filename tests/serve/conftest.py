"""Servers of a seeded model and of the demo model, for the tests of a module.

Not for a session: an open model has a process group, by which tests elsewhere would know their rank.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.servers import Server, serving


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path]) -> Iterator[Server]:
    with serving(checkpoint("mha"), max_seq_len=160, max_batch_size=4) as running:
        yield running


@pytest.fixture(scope="module")
def demo_server(demo: Path) -> Iterator[Server]:
    with serving(demo, dtype="float32", max_seq_len=512, max_batch_size=8) as running:
        yield running
