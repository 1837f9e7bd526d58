"""Other formats to Meta's layout and back: Hugging Face, GGUF, llama2.c. Public are `convert` and `ConvertError`.

Imports checkpoint, tokenizer, chat and the rows below them. Every reader returns a `Source`, both writers take one.
"""

from llama.convert.conversion import convert
from llama.convert.source import ConvertError

__all__ = ["ConvertError", "convert"]
