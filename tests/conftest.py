import fcntl
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The seeded models are too small to profit from threads, so this process and the ranks that tests start use one each.
# Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests download nothing. Without this, Hugging Face's packages retry many times if there is no network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}

# Tests send SIGINT and SIGHUP to programs that they start. If our parent ignores these signals (`nohup make test &`, a
# script's background job, some CI runners), these programs would ignore them, too. If this process has a handler, they
# start with the default action. Workers of pytest-xdist also import this file.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # under nohup, pytest must survive SIGHUP

from golden.make_checkpoint import write
from helpers.commands import Ended, run_command
from helpers.paths import DEMO, DEMO_GGUF, GOLDEN
from llama import Llama

MEASURED: dict[str, object] = {}


@pytest.fixture(scope="session")
def measured() -> Callable[[str, object], None]:
    """measured(name, figure): print a figure at the end of the run, even if its test fails."""
    return MEASURED.__setitem__


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, whose controller prints the summary
        session.config.workeroutput["measured"] = MEASURED


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    MEASURED.update(getattr(node, "workeroutput", {}).get("measured", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("measured")
        for name, figure in MEASURED.items():
            terminalreporter.write_line(f"{name}: {figure:.2g}" if isinstance(figure, float) else f"{name}: {figure}")


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Answers of Meta's own code on the seeded checkpoints (float32, CPU, greedy)."""
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="session")
def smollm2() -> dict[str, Any]:
    """Like `golden`, for SmolLM2-135M-Instruct, dequantized from its GGUF file."""
    return json.loads((GOLDEN / "smollm2.json").read_text())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(name, shards=1): the folder of a seeded checkpoint with its tokenizer, written once per worker."""
    made: dict[tuple[str, int], Path] = {}

    def make(name: str, shards: int = 1) -> Path:
        if (name, shards) not in made:
            made[name, shards] = tmp_path_factory.mktemp(f"{name}-{shards}-shards")
            write(name, made[name, shards], shards)
        return made[name, shards]

    return make


@pytest.fixture
def build(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Llama]]:
    """build(name, shards=1, **arguments): a seeded model in this process, closed at the end of the test."""
    built: list[Llama] = []

    def make(name: str, shards: int = 1, **arguments: Any) -> Llama:
        built.append(Llama.build(checkpoint(name, shards), **arguments))
        return built[-1]

    yield make
    for llama in built:
        llama.close()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Llama]]:
    """The models that commands build in this process.

    They are closed at the end of the test: a command that fails leaves its model open until the process exits.
    """
    models: list[Llama] = []
    build = Llama.build

    def recording(*args: Any, **kwargs: Any) -> Llama:
        models.append(build(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(Llama, "build", staticmethod(recording))
    yield models
    for llama in models:
        llama.close()


@pytest.fixture
def command(
    built: list[Llama],
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ended]:
    """command(name, *args, stdin=""): `python -m llama` in this process, on a seeded model."""

    def run(name: str, *args: str, stdin: str | io.StringIO = "") -> Ended:
        stream = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        return run_command([name, "--ckpt_dir", str(checkpoint("mha")), *args], monkeypatch, capsys, stream)

    return run


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of this run that pytest-xdist's workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo checkpoint, bfloat16."""
    if not (DEMO / "params.json").exists():
        pytest.skip("the demo checkpoint is missing: `make demo` fetches it")
    return DEMO


@pytest.fixture(scope="session")
def demo_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model dequantized to float32, in three shards."""
    if not DEMO_GGUF.exists():
        pytest.skip(f"{DEMO_GGUF.name} is missing: `make demo` fetches it")
    from llama.convert import convert

    folder = shared_folder(tmp_path_factory) / "demo-float32"
    with (folder.parent / "demo-float32.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():  # convert moves it there when it is complete
            convert(str(DEMO_GGUF), str(folder), dtype="float32", shards=3)
    return folder
