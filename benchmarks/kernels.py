"""Times kernels for quantized weights: milliseconds for all matrices of the demo model's layers, in bfloat16.

    python benchmarks/kernels.py

One row is a decode step, 512 rows are a prompt. torchao's row is left out if torchao is not installed.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn

from llama.accelerate import native
from llama.accelerate.fused import Dense
from llama.accelerate.quantize import Int4, Int8, PackedInt4

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # wqkv, wo, w13, w2
LAYERS, ROUNDS = 30, 9

KERNELS: dict[str, Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "bfloat16, F.linear": lambda weight: Dense(weight, False),
    "bfloat16, native.c": lambda weight: Dense(weight, True),
    "int8, torch's _weight_int8pack_mm": Int8,
    "int8, native.c": lambda weight: native.NativeQuantizedLinear(Int8(weight)),
    "int4, torch's _weight_int4pack_mm_for_cpu": PackedInt4,
    "int4, native.c": lambda weight: native.NativeQuantizedLinear(Int4(weight)),
}


def with_torchao(weight: torch.Tensor) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder


def milliseconds(layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], rows: int) -> float:
    inputs = [torch.randn(rows, k).bfloat16() for _, k in SHAPES] * LAYERS
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds)


@torch.inference_mode()
def main() -> None:
    native.compile_library()
    weights = [torch.randn(shape).bfloat16() for shape in SHAPES * LAYERS]
    kernels = dict(KERNELS)
    try:
        with_torchao(weights[0])
        kernels["int8, torchao"] = with_torchao
    except ImportError:
        pass
    print(f"| torch {torch.__version__}, {torch.get_num_threads()} threads, ms | 1 row | 512 rows |\n|---|---|---|")
    for name, kernel in kernels.items():
        layers = [kernel(weight) for weight in weights]
        print(f"| {name} | {milliseconds(layers, 1):.1f} | {milliseconds(layers, 512):.0f} |", flush=True)


if __name__ == "__main__":
    main()
