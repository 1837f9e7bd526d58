"""What fits into memory: the size of a model for each number of ranks, and the check before loading.

Imports `accelerate`, `checkpoint` and the rows below them in ARCHITECTURE.md.
"""
