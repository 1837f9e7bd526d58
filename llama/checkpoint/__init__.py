"""Files to tensors of this rank: shards in Meta's layout, resharding for any number of ranks, verification.

Imports console, files, params, parallel and model (for shapes). Other formats are converted first, by `convert`.
"""
