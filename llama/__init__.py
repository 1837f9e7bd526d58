"""A reference runner for Llama checkpoints in Meta's style."""

from llama.chat_format import Dialog, Message
from llama.completion import Llama
from llama.conversation import Conversation
from llama.model import Transformer
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Conversation", "Dialog", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]
