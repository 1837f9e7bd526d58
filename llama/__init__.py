"""A reference runner for Llama checkpoints in Meta's style."""

import contextlib
import sys

from llama.interrupt import exit_on_interrupt, restore_interrupt

IS_PROGRAM = sys.argv[0] == "-m"  # `python -m llama`; an imported library must not change signal handlers
if IS_PROGRAM:
    restore_interrupt()
with exit_on_interrupt() if IS_PROGRAM else contextlib.nullcontext():
    from llama.chat.formats import Dialog, Message
    from llama.console import configure_logging
    from llama.conversation import Conversation
    from llama.generation import LLaMA, Llama
    from llama.model import Transformer
    from llama.params import ModelArgs
    from llama.tokenizer import Tokenizer

configure_logging()

__version__ = "0.1.0"
__all__ = ["Conversation", "Dialog", "LLaMA", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]
