"""What fits into memory: the size of a model at each number of ranks, and the check before loading.

Imports engine, accelerate and the rows below them.
"""
