"""Encode dialogs into token ids, in the formats that models were trained with.

Imports the tokenizer and the layers below it (see ARCHITECTURE.md).
"""
