"""The same model faster: fused layers, quantized weights, measured kernels, the native decode step (native.c).

Imports checkpoint and the rows below it. What is computed is defined in `llama.model`; nothing here changes results
beyond rounding, and each part checks that the model is still the one it was made from.
"""
