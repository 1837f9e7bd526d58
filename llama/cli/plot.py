"""The plot of `llama bench --plot`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHORTEST_CONTEXT = 128


def check_plot(path: Path, longest: int) -> None:
    """Raise ValueError before the measurement if the plot could not be drawn or written after it."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -e '.[bench]'")
    if longest < SHORTEST_CONTEXT:
        raise ValueError(f"--plot begins at {SHORTEST_CONTEXT} tokens: give a --prompt that long, not {longest}")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: give a name that ends in .png")
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written ({error.strerror}): name another file") from None
    if is_new:
        path.unlink()


def draw(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG: step time, measured and expected, and memory, both against the context."""
    from matplotlib.figure import Figure  # without pyplot it uses the Agg backend, which needs no display

    figure = Figure(figsize=(7, 7), layout="constrained")
    speed, memory = figure.subplots(2, sharex=True)
    contexts = [point["context"] for point in points]
    for axes, key, factor, style, label in (
        (speed, "step_s", 1e3, "o-", "a step, measured"),
        (speed, "expected_step_s", 1e3, "--", "expected from the bytes of keys and values"),
        (memory, "peak_memory", 1e-6, "s-", "peak"),
        (memory, "kv_bytes", 1e-6, "o-", "keys and values of this context"),
    ):
        if points[0][key] is not None:
            axes.plot(contexts, [point[key] * factor for point in points], style, label=label)
    speed.set(title=title, ylabel="ms", ylim=(0, None))
    memory.set(xlabel="context, tokens", ylabel="MB", ylim=(0, None), xscale="log")
    memory.set_xticks(contexts, [f"{context:,}" for context in contexts])
    memory.minorticks_off()
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
