"""Log-probabilities and what is made of them: scoring, perplexity, token reports, lm-evaluation-harness, conformance.

Imports `llama.Llama` and everything below; nothing imports it but commands.
"""
