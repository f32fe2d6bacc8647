#!/usr/bin/env bash
# Expected: Grad-CAM of a layer depends on what the network computes, not on whether the ReLU behind it is in place.
# Happens:  grad-cam's hook keeps a reference to the layer's output. A ReLU in place overwrites it before it is read, so
#           that the map of the same layer, of a network with the same weights and outputs, differs by up to 0.28 of its
#           range of 1. captum's maps are equal. Afterwards grad-cam leaves gradients in all parameters, which the next
#           step of an optimizer would take.
# Matters:  torchvision's networks have their ReLU in place. Two models that compute the same function "look at" other
#           places, and an explanation made between two epochs changes the training.
# Takes 5 GB and two minutes, nearly all of it torch.
# Seen with grad-cam 1.5.7, captum 0.9.0, torch 2.15.0, NumPy 2.4.6, Python 3.11:
#   with and without in place: outputs 0.000000, grad-cam 0.276, captum 0.000000; gradients left in 10 of 10 parameters
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "grad-cam==1.5.7" "captum==0.9.0" "torch==2.15.0" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn


def network(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ).eval()


def largest_difference(function):
    return float((function(network(False)) - function(network(True))).abs().max())


def gradcam(model):
    with GradCAM(model=model, target_layers=[model[4]]) as cam:
        return torch.from_numpy(cam(input_tensor=photos, targets=[ClassifierOutputTarget(1)] * len(photos)))


def captum(model):
    return LayerGradCam(model, model[4]).attribute(photos, target=1, relu_attributions=True).detach()


torch.manual_seed(0)
photos = torch.randn(2, 3, 16, 16)
outputs, theirs, other = map(largest_difference, (lambda model: model(photos).detach(), gradcam, captum))
gradcam(model := network(False))
left = [parameter.grad is not None for parameter in model.parameters()]
print(
    f"with and without in place: outputs {outputs:.6f}, grad-cam {theirs:.3f}, captum {other:.6f}; "
    f"gradients left in {sum(left)} of {len(left)} parameters"
)
raise SystemExit(not (outputs == other == 0 and theirs > 0.1 and all(left)))
PYTHON
