"""The command `llama`: one file for each command.

Imports everything; nothing imports it but the example scripts.
"""
