"""Metadata is in pyproject.toml."""

from setuptools import setup  # type: ignore[import-untyped]  # ships no types

setup()
