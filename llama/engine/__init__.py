"""Token ids in, token ids out: requests, prefill and decode, sampling, streaming.

Imports `accelerate` and the rows below it in ARCHITECTURE.md. Only `streaming.py` handles text: it decodes ids.
"""
