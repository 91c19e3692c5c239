#!/usr/bin/env bash
# Inside torch.autocast on a CPU, F.affine_grid multiplies in bfloat16 and returns a bfloat16 grid, although box and images are
# float32. F.grid_sample then takes that grid for float32 images without a word, and pixels of a small crop are read up to a
# quarter of their distance beside their place.
# Augmentation inside an autocast region is thereby changed silently; outside of it, or with float32 kept by
# torch.autocast(..., enabled=False), it is exact.
# Seen with torch 2.14.1 on Linux x86-64, Python 3.11, CPU. Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

photo_side, crop_side = 192, 64
box = torch.tensor([[[0.3, 0.0, 0.613], [0.0, 0.3, 0.613]]])  # the lower right part of a photo
exact = F.affine_grid(box, (1, 3, crop_side, crop_side), align_corners=False)
with torch.autocast("cpu", torch.bfloat16):
    rounded = F.affine_grid(box, (1, 3, crop_side, crop_side), align_corners=False)

apart = (rounded.float() - exact).abs().max().item() * photo_side / 2
step = (exact[0, 0, 1, 0] - exact[0, 0, 0, 0]).item() * photo_side / 2
print("torch", torch.__version__)
print("dtype outside and inside autocast:", exact.dtype, rounded.dtype)
print(f"largest shift: {apart:.2f} pixels of the photo; pixels of the crop are {step:.2f} apart")
assert exact.dtype == torch.float32
assert rounded.dtype == torch.bfloat16 and apart / step > 0.2, "changed: the grid is exact inside autocast"
PYTHON
# Output seen:
# torch 2.14.1+cu130
# dtype outside and inside autocast: torch.float32 torch.bfloat16
# largest shift: 0.25 pixels of the photo; pixels of the crop are 0.90 apart
