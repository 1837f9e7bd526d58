"""Checkpoint files to the tensors of one rank: params.json, shards in Meta's layout, resharding, verification.

Imports model and the rows below it. Other formats are converted to Meta's layout first, by `llama.convert`.
"""
