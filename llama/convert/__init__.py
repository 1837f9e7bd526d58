"""Convert checkpoints: read Meta's layout, Hugging Face's, GGUF and llama2.c, and write Meta's or Hugging Face's.

`convert` and `ConvertError` are public. Imports checkpoint, tokenizer, chat and the layers below them (see
ARCHITECTURE.md). Every reader returns a `Source`, and both writers accept one.
"""

from llama.convert.conversion import convert
from llama.convert.source import ConvertError

__all__ = ["ConvertError", "convert"]
