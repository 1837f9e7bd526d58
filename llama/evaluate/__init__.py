"""Evaluate models: log-probabilities, perplexity, token reports, lm-evaluation-harness, and conformance kits.

Imports `llama.Llama` and the layers below it (see ARCHITECTURE.md). Only commands import this package.
"""
