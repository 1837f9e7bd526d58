"""Conformance kits: test vectors that another implementation compares its own with.

docs/conformance.md describes the files of a kit and how another implementation writes its side.
"""
