"""A reference runner for Llama checkpoints in Meta's style."""

import os
import sys

from llama.interrupt import restore_interrupt

try:
    if sys.argv[0] == "-m":  # `python -m llama`: a library that is imported leaves signals alone
        restore_interrupt()
    from llama.chat_format import Dialog, Message
    from llama.conversation import Conversation
    from llama.generation import LLaMA, Llama
    from llama.model import Transformer
    from llama.params import ModelArgs
    from llama.tokenizer import Tokenizer
except KeyboardInterrupt:
    if sys.argv[0] == "-m":  # ends in one way, also while torch is imported
        os._exit(130)
    raise

__version__ = "0.1.0"
__all__ = ["Conversation", "Dialog", "LLaMA", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]
