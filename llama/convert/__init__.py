"""Convert checkpoints from Hugging Face's format, GGUF and llama2.c to Meta's layout, and to Hugging Face's format.

`convert` and `ConvertError` are public. Imports checkpoint, tokenizer, chat and the layers below them (see
ARCHITECTURE.md). Every reader returns a `Source`, and both writers accept one.
"""

from llama.convert.conversion import convert
from llama.convert.source import ConvertError

__all__ = ["ConvertError", "convert"]
