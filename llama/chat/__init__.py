"""Dialogs to token ids: the formats that models were trained with, by name.

Imports the tokenizer and the rows below it. A format writes special ids itself, so no text can forge them.
"""
