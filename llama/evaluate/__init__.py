"""Log-probabilities and what is computed from them: scoring, perplexity, token reports, lm-evaluation-harness; and
conformance kits.

Imports `llama.Llama` and everything below; nothing imports it but commands.
"""
