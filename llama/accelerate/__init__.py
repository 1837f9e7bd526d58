"""The same model faster: fused layers, quantized weights, measured kernels, compiled decode steps.

Imports checkpoint and the rows below it. `llama.model` defines what is computed. Except for quantization nothing here
changes results beyond rounding, and `executor` checks that the model is still the one that the rest was derived from.
"""
