#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0 (CPU): int8 weight-only quantization takes the largest weight of a row over 127.5 as its
# step, though its codes reach 127: the largest weights are half a step off. Weights that int8 holds exactly, such as -1,
# 0 and 1, are changed, and what was quantized once is changed again by a second time, outwards as well, by the code -128.
#
# A good guess: the step is the largest weight over 127, so that the extremes are exact and a second time changes nothing.
# Seen, rows of -1, 0 and 1, the least and the largest weight after one, two and eight times:
#   -0.9961 0.9961   -1.0 0.9922   -1.0157 1.0078
# and of a row of whole numbers from -127 to 127 the least, the largest, and the most by which a weight is off:
#   -127.498 126.502 0.498
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 torchao==0.18.0 numpy
"$folder/env/bin/python" - 2> /dev/null << 'PY'
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def once(weight):
    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0].weight.dequantize()


weight, ends = torch.tensor([[-1.0, 0.0, 1.0, 0.0]]).repeat(4, 16), []
for _ in range(8):
    weight = once(weight)
    ends.append([round(float(weight.min()), 4), round(float(weight.max()), 4)])
whole = torch.arange(-127.0, 128.0).repeat(4, 1)
back = once(whole)
rows = [round(float(each), 3) for each in (back.min(), back.max(), (back - whole).abs().max())]
print(ends[0], ends[1], ends[7], rows)
assert [ends[0], ends[1], ends[7]] == [[-0.9961, 0.9961], [-1.0, 0.9922], [-1.0157, 1.0078]], ends
assert rows == [-127.498, 126.502, 0.498], rows
PY
