"""`llama serve`: one model over HTTP, with OpenAI's endpoints.

Needs the extra "serve" (fastapi, uvicorn, prometheus-client). Imports `generation` and the rows below it in
ARCHITECTURE.md; only the command `llama serve` imports it. Requests become rows of the engine's scheduler, and only its
thread computes.
"""
