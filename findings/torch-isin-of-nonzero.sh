#!/usr/bin/env bash
# torch.isin raises "view size is not compatible ..." when its second argument is what Tensor.nonzero() returned for a
# matrix: that result is stored by columns, and the branch of isin for few test elements flattens it with view. The same
# values in a contiguous copy work, and so does the other branch (many test elements). Whoever looks up "which rows occur in
# these index pairs" meets the error only once the list of pairs is short enough.
# Seen with torch 2.14.1 on Linux x86-64, Python 3.11, CPU. Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

matrix = torch.zeros(6, 6)
matrix[1, 2] = matrix[3, 4] = 1
few = matrix.nonzero()
many = torch.ones(200, 200).nonzero()
elements = torch.arange(6)

print("torch", torch.__version__, "strides of nonzero():", few.stride())
print("contiguous copy:", torch.isin(elements, few.contiguous()).tolist())
print("many test elements:", torch.isin(elements, many).tolist())
try:
    print("few test elements:", torch.isin(elements, few).tolist())
    raise SystemExit("changed: no error any more")
except RuntimeError as error:
    print("few test elements: RuntimeError:", str(error)[:75])
assert few.stride() == (1, 2)
PYTHON
# Output seen:
# torch 2.14.1+cu130 strides of nonzero(): (1, 2)
# contiguous copy: [False, True, True, True, True, False]
# many test elements: [True, True, True, True, True, True]
# few test elements: RuntimeError: view size is not compatible with input tensor's size and stride (at least o
