#!/usr/bin/env bash
# Expected: ResNet-18 from scratch is the same model in torchvision and in timm: parameters have the same names and
#           shapes, and a state dict of one loads into the other.
# Happens:  timm starts the last BatchNorm of each block at 0, so that all 8 blocks begin as their shortcut. In the
#           first step 16 of its 20 convolutions have a gradient of exactly 0; torchvision's all have one.
# Matters:  "ResNet-18" of two papers, or in two rows of a table, is two models from scratch. With a few hundred photos
#           a start can decide as much as a layer, so the name has to say which library it is of.
# Takes 5 GB and two minutes, nearly all of it torch.
# Seen with timm 1.0.31, torchvision 0.29.2, torch 2.15.0, Python 3.11:
#   the same names and shapes; torchvision: 0 of 20 BatchNorms start at 0, 0 of 20 convolutions without gradient;
#   timm: 8 of 20 BatchNorms start at 0, 16 of 20 convolutions without gradient
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "timm==1.0.31" "torchvision==0.29.2" "torch==2.15.0" 2>/dev/null
"$folder/env/bin/python" - 2>/dev/null <<'PYTHON'
import timm
import torch
import torchvision
from torch import nn


def start(model):
    """BatchNorms that begin at 0, and convolutions that learn nothing from a first batch."""
    photos, labels = torch.randn(8, 3, 64, 64, generator=torch.manual_seed(0)), torch.arange(8) % 2
    nn.functional.cross_entropy(model(photos), labels).backward()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return (
        sum(not m.weight.any() for m in norms), len(norms),
        sum(not m.weight.grad.any() for m in convolutions), len(convolutions),
    )


torch.manual_seed(0)
of_timm = timm.create_model("resnet18", num_classes=2)
models = {"torchvision": torchvision.models.resnet18(num_classes=2), "timm": of_timm}
shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models.values()]
same = shapes[0] == shapes[1]
print("the same names and shapes" if same else "other names or shapes", end="")
found = {}
for name, model in models.items():
    zero, norms, idle, convolutions = found[name] = start(model)
    print(f"; {name}: {zero} of {norms} BatchNorms start at 0,", end="")
    print(f" {idle} of {convolutions} convolutions without gradient", end="")
print()
raise SystemExit(not (same and found["torchvision"][::2] == (0, 0) and found["timm"][::2] == (8, 16)))
PYTHON
