"""Load the tensors of one rank from checkpoint files: params.json, shards in Meta's layout, resharding, verification.

Imports model and the layers below it (see ARCHITECTURE.md). `llama.convert` converts other formats to Meta's layout.
"""
