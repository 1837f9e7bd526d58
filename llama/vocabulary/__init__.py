"""The three kinds of tokenizer file, each read into a `Backend`: SentencePiece, tiktoken ranks, tokenizer.json.

Imports files and the rows below it. The rest of the package uses `llama.tokenizer.Tokenizer`, which is built on these.
"""
