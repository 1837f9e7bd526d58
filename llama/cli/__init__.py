"""The command `llama`, with one module for each subcommand.

It may import every other part of the package. Only the example scripts import it.
"""
