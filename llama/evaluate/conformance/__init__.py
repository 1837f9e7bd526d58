"""Conformance kits: test vectors for comparing another implementation with this one.

docs/conformance.md describes the files of a kit, and how another implementation writes its own.
"""
