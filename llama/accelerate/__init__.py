"""Faster computation of the same model: fused layers, quantized weights, measured kernels, compiled decode steps.

Imports `checkpoint` and the rows below it in ARCHITECTURE.md. `llama.model` defines what is computed. Except for
quantization, nothing here changes results beyond rounding. `executor` notices when the user changes the model.
"""
