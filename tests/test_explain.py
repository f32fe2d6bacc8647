"""Grad-CAM: the maps against the formula on the network itself, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import models
from experiments.__main__ import app
from experiments.champion.explain import GAP, SIDE, heat, overlay, with_feature_map
from experiments.champion.export import Classifier

# the layers whose output is the last feature map
LAYERS = {"timm:test_resnet": "layer4", "timm:test_convnext": "stages.3"}


def exported(name: str, size: int = 64) -> tuple[Classifier, nn.Module]:
    torch.manual_seed(0)
    network = models.build(name, 3, 3, size).requires_grad_(False)
    classifier = Classifier(network, torch.full((3,), 120.0), torch.full((3,), 60.0)).eval()
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return classifier, torch.export.export(classifier, (example,), dynamic_shapes=dynamic).module()


def images(size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", LAYERS)
def test_maps_are_those_of_the_formula(name: str) -> None:
    classifier, program = exported(name)
    kept: list[Tensor] = []

    def keep(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().clone().requires_grad_())
        return kept[-1].clone()

    pixels = torch.from_numpy(images())
    before = program(pixels)
    found = with_feature_map(program)
    assert found is not None
    maps = heat(found, images())
    assert torch.equal(program(pixels), before)
    classifier.model.get_submodule(LAYERS[name]).register_forward_hook(keep)
    normalised = (pixels.float() - classifier.mean) / classifier.std
    logits = classifier.model(normalised.permute(0, 3, 1, 2))
    logits.amax(1).sum().backward()
    assert kept[0].grad is not None
    weights = kept[0].grad.mean((2, 3), keepdim=True)
    expected = (weights * kept[0]).sum(1, keepdim=True).relu().detach()
    expected = functional.interpolate(expected, (64, 64), mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-12)
    assert expected.max() > 0.5
    np.testing.assert_allclose(maps, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("name", ["timm:test_vit", "linear"])
def test_networks_without_a_feature_map_are_left_out(name: str) -> None:
    assert with_feature_map(exported(name)[1]) is None


def test_the_warmest_place_is_where_it_speaks_for_the_class() -> None:
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
            with torch.no_grad():
                self.conv.weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 1, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu_(self.conv(x)).mean((2, 3))

    image = np.zeros((1, 32, 32, 1), np.uint8)
    image[0, 20:30, 2:12] = 255
    classifier = Classifier(Corner(), torch.zeros(1), torch.ones(1)).eval()
    program = torch.export.export(classifier, (torch.from_numpy(image.repeat(2, 0)),)).module()
    found = with_feature_map(program)
    assert found is not None
    (warmth,) = heat(found, image.repeat(2, 0))[:1]
    assert warmth[20:30, 2:12].min() > 0.4 and warmth[21:29, 3:11].min() == 1 and warmth[:18].max() == 0
    sheet = np.asarray(overlay(image[0], warmth)).astype(int)
    assert sheet.shape == (SIDE, 2 * SIDE + GAP, 3)
    changed = np.abs(sheet[:, :SIDE] - sheet[:, -SIDE:]).sum(2)
    assert changed[150:200, 25:75].min() > 50 and changed[:120].max() == 0


def test_predict_writes_overlays_beside_the_photos(finished_task3: str, tmp_path: Path) -> None:
    names = ("a/dress.png", "b/dress.jpg", "b/text.jpg", "b/Dress-2.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(images(40)[0]).save(tmp_path / name)
    (tmp_path / names[2]).write_text("no picture")
    photos = [tmp_path / name for name in names]
    contents = [photo.read_bytes() for photo in photos]
    arguments = ["predict", "task3", *photos, "--explain", tmp_path / "a", "--tracking-uri", finished_task3]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "text" in error
    assert f"Grad-CAM overlays of 3 photos in {tmp_path / 'a'}" in result.stdout
    assert [photo.read_bytes() for photo in photos] == contents
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "dress.png", "dress.gradcam.png", "dress-2.gradcam.png", "Dress-2-2.gradcam.png"
    }  # fmt: skip
    assert Image.open(tmp_path / "a" / "dress.gradcam.png").size == (2 * SIDE + GAP, SIDE)
