"""Token ids in, token ids out: requests, prefill and decode, sampling, streaming.

Imports accelerate and the rows below it. Text appears in `streaming.py` only, which turns ids into it.
"""
