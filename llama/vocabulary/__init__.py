"""Read the three kinds of tokenizer file, SentencePiece, tiktoken ranks and tokenizer.json, each into a `Backend`.

Imports files and the layers below it (see ARCHITECTURE.md). The rest of the package uses `llama.tokenizer.Tokenizer`,
which has one of these backends.
"""
