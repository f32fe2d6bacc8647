"""Architectures of torchvision and timm, pretrained weights, weights of a file, and training of the head alone."""

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import analysis
import models
import tracking
from analysis.__main__ import app as analysis_app
from experiments.__main__ import app
from experiments.provenance import fingerprint
from experiments.training.state import TrainingState
from models import library, weights
from models.freezing import HeadOnly, head_of
from models.registry import _all_products
from tests.conftest import call_command, new_store
from tracking import keys
from tracking.settings import LATER, TrainingConfig, logged_settings

SMALL = ("torchvision:squeezenet1_1", "timm:test_resnet", "timm:test_vit", "timm:test_convnext")
OFFLINE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # nobody listens there


@pytest.mark.parametrize("shape", [(3, 2, 64), (1, 10, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_a_librarys_model_is_fitted_to_the_images(name: str, shape: tuple[int, int, int]) -> None:
    channels, classes, size = shape
    torch.manual_seed(0)
    model = models.build(name, *shape)
    logits = model(torch.randn(3, channels, size, size))
    assert model.training and logits.shape == (3, classes) and logits.isfinite().all()
    card = models.describe(name, *shape)
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    version = (timm if name.startswith("timm") else torchvision).__version__.partition("+")[0]
    assert card.description.startswith(f"`{name.partition(':')[2]}` of {name.partition(':')[0]} {version}.")
    assert card.layers and card.macs > 1e5


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_products_are_those_of_the_layers(name: str) -> None:
    macs = 0

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    model = models.build(name, 3, 2, 64).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 3, 64, 64))
    assert models.describe(name, 3, 2, 64).macs == macs


@pytest.mark.parametrize("learns", [True, False])  # torch has a short cut through attention without gradients
def test_products_of_attention_count(learns: bool) -> None:
    n, d, layers = 16 + 1, 24, 2  # tokens, width
    network = torchvision.models.VisionTransformer(64, 16, layers, 2, d, 4 * d, num_classes=2)
    # patches; qkv, scores, values, projection and two layers of the MLP; the head
    expected = 16 * 3 * 16 * 16 * d + layers * (12 * n * d * d + 2 * n * n * d) + 2 * d
    images = torch.zeros(1, 3, 64, 64)
    assert _all_products(lambda: network.eval().requires_grad_(learns)(images)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("name", "shape", "reason"), [
    ("torchvision:googlenet", (3, 2, 64), "it returns a GoogLeNetOutputs, not a tensor of logits"),
    ("torchvision:alexnet", (1, 10, 28), "Output size is too small"),
    ("torchvision:vit_b_16", (3, 2, 28), "Input shape indivisible by patch size!"),
    ("timm:test_vit", (1, 10, 28), "its patches of 16 pixels do not divide the image"),
    ("timm:pvt_v2_b0", (3, 2, 28), "Kernel size can't be greater than actual input size"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_refused_in_one_sentence(name: str, shape: tuple[int, int, int], reason: str) -> None:
    with warnings.catch_warnings(record=True) as warned, pytest.raises(models.ModelError) as error:
        warnings.simplefilter("always")
        models.describe(name, *shape)
    assert not warned
    assert str(error.value).startswith(f"{name} cannot be built for {shape[2]}x{shape[2]} images")
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_overlapping_patches_need_not_divide_the_image() -> None:
    assert models.build("timm:pvt_v2_b0", 3, 2, 64).patch_embed.proj.kernel_size == (7, 7)


def test_unknown_architectures_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.why_unknown("timm:test_resnet.r160_in1k") == models.why_unknown("torchvision:resnet18") == ""
    assert re.fullmatch(
        r"timm 1\S+ has no image classifier 'convnext_ato'; did you mean timm:convnext_atto or .*",
        models.why_unknown("timm:convnext_ato"),
    )
    assert models.why_unknown("timm:test_resnet.r160").endswith(  # other weights than timm has for it
        "has no image classifier 'test_resnet.r160'; did you mean timm:test_resnet.r160_in1k or timm:test_resnet?"
    )
    assert models.why_unknown("torchvision:fasterrcnn_resnet50_fpn").endswith("'fasterrcnn_resnet50_fpn'")  # a detector
    assert models.why_unknown("lenet").endswith("torchvision:NAME and timm:NAME; did you mean lenet5?")

    def missing(name: str) -> frozenset[str]:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(library, "_architectures", missing)
    with pytest.raises(
        models.ModelError, match=r"^timm:test_vit needs timm, which is not installed: pip install timm$"
    ):
        models.build("timm:test_vit", 3, 2, 32)


def test_gray_is_rgb_with_equal_channels() -> None:
    torch.manual_seed(0)
    rgb = torchvision.models.squeezenet1_1(num_classes=4).eval()
    gray = library.fit_first_convolution(torchvision.models.squeezenet1_1(num_classes=4), 1).eval()
    state = {key: value for key, value in rgb.state_dict().items() if key != "features.0.weight"}
    gray.load_state_dict(state | {"features.0.weight": library.sum_of_channels(rgb.features[0].weight)})
    x = torch.randn(2, 1, 40, 40)
    torch.testing.assert_close(gray(x), rgb(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_source_is_version_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(name: str, freeze: bool = False) -> str:
        return fingerprint.source_of(models.build(name, 3, 2, 32, freeze)).digest

    found = [digest(name) for name in SMALL] + [digest(SMALL[0], freeze=True), digest("lenet5", freeze=True)]
    assert len({*found, digest("lenet5")}) == len(found) + 1
    assert digest(SMALL[1]) == found[1]
    version = library.metadata.version
    monkeypatch.setattr(library.metadata, "version", lambda name: "2.0" if name == "timm" else version(name))
    assert digest(SMALL[1]) != found[1] and digest(SMALL[0]) == found[0]


HEADS = {
    "torchvision:squeezenet1_1": ["classifier.1"],
    "timm:test_resnet": ["fc"],
    "timm:test_vit": ["head"],
    "timm:deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "timm:test_convnext": ["head.fc"],
    "vggnet": ["layers.11"],
}


@pytest.mark.parametrize("name", HEADS)
def test_only_the_head_learns(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, 3, 2, 64 if name == "vggnet" else 32, freeze=True)
    assert isinstance(model, HeadOnly) and list(head_of(model.network)) == HEADS[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = TrainingConfig(precision="fp32", device="cpu", lr=0.1, batch_size=4)
    state = TrainingState(model, config, seed=0)
    size = 64 if name == "vggnet" else 32
    for _ in range(2):
        model.train()
        state.gradients(torch.randn(4, 3, size, size), torch.tensor([0, 1, 0, 1]))
        state.optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"network.{head}.{kind}" for head in HEADS[name] for kind in ("weight", "bias")}
    assert not any(layer.training for layer in model.network.modules() if isinstance(layer, nn.BatchNorm2d))
    assert state.optimizer.state.keys() == {p for p in model.parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def squeezenet() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return torchvision.models.squeezenet1_1(num_classes=7).state_dict()


def test_weights_of_a_file_fit_but_for_the_head(squeezenet: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(squeezenet, tmp_path / "a.pt")
    save_file(squeezenet, tmp_path / "a.safetensors")
    torch.save({"state_dict": squeezenet, "epoch": 3}, tmp_path / "checkpoint.pt")
    for name in ("a.pt", "a.safetensors", "checkpoint.pt"):
        path = tmp_path / name
        began = weights.from_file(path, "torchvision:squeezenet1_1", 3, 2, 64)
        assert began.label == f"file {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        assert began.left_out == "classifier.1.weight, classifier.1.bias, which is for other classes"
        mean, std = weights.parse_normalisation(began.normalisation)
        assert (mean / 255).tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert (std / 255).tolist() == pytest.approx([0.229, 0.224, 0.225])
        model = models.build("torchvision:squeezenet1_1", 3, 2, 64, freeze=True)
        own = model.state_dict()["network.classifier.1.weight"].clone()
        began.load_into(model)
        for key, value in model.network.state_dict().items():
            assert (
                torch.equal(value, own if key == "classifier.1.weight" else squeezenet.get(key, value)) or "1.b" in key
            )
    same = weights.from_file(tmp_path / "a.pt", "torchvision:squeezenet1_1", 1, 7, 64)
    assert same.left_out == "" and len(same.normalisation.split()) == 2
    assert np.allclose(same.state["features.0.weight"], squeezenet["features.0.weight"].sum(1, keepdim=True))


class Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("executed",)


def test_files_that_do_not_fit_are_refused_in_one_sentence(
    squeezenet: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = {key: value for key, value in squeezenet.items() if key != "features.3.squeeze.bias"}
    less["features.0.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(less | {"extra": torch.zeros(1)}, tmp_path / "less.pt")
    torch.save({"x": Code()}, tmp_path / "code.pt")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Code(), protocol=4))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"model": squeezenet, "epoch": 3}, tmp_path / "nested.pt")
    bias = squeezenet["features.0.bias"]
    torch.save(squeezenet | {"features.0.bias": bias / 0}, tmp_path / "infinite.pt")
    save_file(squeezenet | {"features.0.bias": bias.to(torch.int8)}, tmp_path / "whole.safetensors")
    for name in ("pointer.pt", "pointer.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "page.pt").write_text("\n<!DOCTYPE html>\n<html></html>")
    expected = {
        "less.pt": "does not fit torchvision:squeezenet1_1: extra is unknown to the model; features.0.weight has shape "
        "(64, 3, 5, 5), not (64, 3, 3, 3); features.3.squeeze.bias is missing",
        "code.pt": "is no file of tensors, or would execute code as it is read",
        "numbers.pt": "holds no state dict: names with tensors, and nothing else; its names are lr",
        "nested.pt": "holds no state dict: names with tensors, and nothing else; its names are model, epoch",
        "infinite.pt": "does not fit torchvision:squeezenet1_1: features.0.bias holds whole numbers, infinity or NaN",
        "whole.safetensors": "features.0.bias holds whole numbers, infinity or NaN",
        "pointer.pt": "is a pointer of Git LFS, not the weights; `git lfs pull` fetches them",
        "pointer.safetensors": "is a pointer of Git LFS, not the weights; `git lfs pull` fetches them",
        "page.pt": "is a web page, not the weights; download the file itself",
        "pickle.pt": "is no file of tensors, or would execute code as it is read",
        "empty.pt": "cannot be read as a state dict (EOFError: it is empty)",
        "text.pt": "is no file of tensors",
        "text.safetensors": "cannot be read as a state dict (SafetensorError",
        "missing.pt": "cannot be read (No such file or directory)",
    }
    for name, reason in expected.items():
        with warnings.catch_warnings(record=True) as warned, pytest.raises(models.ModelError) as error:
            warnings.simplefilter("always")
            weights.from_file(tmp_path / name, "torchvision:squeezenet1_1", 3, 2, 64)
        assert not warned, name
        assert str(tmp_path / name) in str(error.value) and reason in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(models.ModelError, match=r"does not fit lenet5: .* is unknown to the model; and \d+ more"):
        weights.from_file(tmp_path / "less.pt", "lenet5", 3, 2, 64)
    assert capsys.readouterr().out == ""


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of both libraries on a machine without a network."""
    import huggingface_hub.constants

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    weights._is_reachable.cache_clear()
    yield tmp_path
    weights._is_reachable.cache_clear()


def fill(folder: Path, state: dict[str, Tensor]) -> None:
    """Put weights where the hub's client keeps those of timm:test_resnet."""
    repository = folder / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(state, repository / "snapshots" / "0" / "model.safetensors")


def test_a_librarys_weights_come_from_its_cache_or_one_sentence_says_how(caches: Path) -> None:
    for name, place in (("torchvision:squeezenet1_1", "TORCH_HOME"), ("timm:test_resnet", "HF_HOME")):
        with pytest.raises(models.ModelError) as error:
            weights.from_library(name, 3, 2, 64)
        sentence = str(error.value)
        assert sentence.startswith(f"the weights of {name} are not on this machine, and ")
        assert "--weights FILE" in sentence and place in sentence and "\n" not in sentence
    with pytest.raises(models.ModelError, match="no library has weights for lenet5"):
        weights.from_library("lenet5", 3, 2, 64)
    torch.manual_seed(1)
    theirs = torchvision.models.squeezenet1_1().state_dict()
    (caches / "torch" / "checkpoints").mkdir(parents=True)
    offered = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    torch.save(theirs, caches / "torch" / "checkpoints" / offered.url.rpartition("/")[2])
    began = weights.from_library("torchvision:squeezenet1_1", 3, 2, 64)
    assert re.fullmatch(r"library: SqueezeNet1_1_Weights.IMAGENET1K_V1, [0-9a-f]{12}", began.label)
    assert began.state.keys() == theirs.keys() - {"classifier.1.weight", "classifier.1.bias"}
    assert all(np.array_equal(value, theirs[key]) for key, value in began.state.items())
    theirs = timm.create_model("test_resnet").state_dict()
    fill(caches, theirs)
    began = weights.from_library("timm:test_resnet", 1, 2, 64)
    assert re.fullmatch(r"library: test_resnet.r160_in1k, [0-9a-f]{12}", began.label)
    assert began.state.keys() == theirs.keys() - {"fc.weight", "fc.bias"}
    assert np.array_equal(began.state["layer1.0.conv1.weight"], theirs["layer1.0.conv1.weight"])
    assert np.allclose(began.state["conv1.0.weight"], theirs["conv1.0.weight"].sum(1, keepdim=True), atol=1e-6)


def test_weights_that_timm_would_leave_out_in_silence_are_missed(caches: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    del state["layer2.0.conv1.weight"]
    fill(caches, state)
    with pytest.raises(models.ModelError, match=r"does not fit timm:test_resnet: layer2.0.conv1.weight is missing$"):
        weights.from_library("timm:test_resnet", 3, 2, 64)


def test_the_command_refuses_at_once(caches: Path, squeezenet: dict[str, Tensor], run_here) -> None:
    file = caches / "own.pt"
    torch.save(squeezenet, file)
    store = ("--tracking-uri", f"sqlite:///{caches / 'mlflow.db'}")
    small = ("-m", "timm:test_resnet")
    for options, code, reason in (
        ((*small, "--pretrained"), 1, "whose hub/ holds models--timm--test_resnet.r160_in1k"),  # before a download
        ((*small, "--weights", str(caches / "no.pt")), 2, "no.pt' does not exist"),
        ((*small, "-m", "lenet5", "--weights", str(file)), 2, "a file is for one model, not for 2; name it with -m"),
        ((*small, "--pretrained", "--weights", str(file)), 2, "leave one of them out"),
        (("-m", "timm:test_resnets"), 2, "did you mean timm:test_resnet"),
        ((*small, "--weights", str(file), "--sample"), 1, "does not fit timm:test_resnet: "),
    ):
        result = run_here("experiments/task1.py", *options, *store)
        assert result.returncode == code and reason in " ".join(result.stderr.replace("│", "").split()), result.stderr
    assert not (caches / "mlflow.db").exists()


def test_settings_that_came_later_change_no_run_without_them() -> None:
    assert LATER == {"pretrained": "", "freeze": False, "cudnn_benchmark": False}
    assert logged_settings(TrainingConfig()).keys() == vars(TrainingConfig()).keys() - LATER.keys()
    every = TrainingConfig(freeze=True, pretrained="file 0", cudnn_benchmark=True)
    assert logged_settings(every).keys() == vars(TrainingConfig()).keys()


MODELS = ("-m", "torchvision:squeezenet1_1", "-m", "timm:test_resnet.r160_in1k", "-m", "timm:test_vit")
OWN = ("-m", "timm:test_resnet.r160_in1k", "--freeze", "--jobs", "2")


@pytest.fixture(scope="module")
def trained(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The store of a folder's task with three architectures, one of them again with other weights and a frozen body."""
    folder = tmp_path_factory.mktemp("library")
    rng = np.random.default_rng(0)
    for label, base in (("dark", 60), ("light", 180)):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(base - 50, base + 50, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{number:02d}.png")
    torch.manual_seed(2)
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), folder / "own.pt")
    uri = new_store(empty_database, folder / "store")
    common = ("experiments/folder.py", str(folder / "photos"), "--image-size", "32", "--n-splits", "1", "--epochs", "1",
              "--batch-size", "6", "--no-augment", "--tracking-uri", uri)  # fmt: skip
    for options in ((*MODELS, "--no-baselines"), (*OWN, "--weights", str(folder / "own.pt"))):
        result = call_command((*common, *options), folder, {**os.environ, "COLUMNS": "120"})
        assert result.returncode == 0, result.stdout + result.stderr
    return uri, folder


@pytest.mark.slow
def test_runs_of_a_library_are_runs_like_others(trained: tuple[str, Path]) -> None:
    uri, folder = trained
    runs = analysis.load_runs(["photos"], uri)
    fresh, own = sorted(analysis.comparison_groups(runs), key=lambda group: group["freeze"].any())
    assert set(fresh["model"]) == {"torchvision:squeezenet1_1", "timm:test_resnet.r160_in1k", "timm:test_vit"}
    assert set(fresh["pretrained"]) == {""} and not fresh["freeze"].any()
    assert set(own["model"]) == {"timm:test_resnet.r160_in1k", *keys.BASELINES} and own["freeze"].all()
    digest = hashlib.sha256((folder / "own.pt").read_bytes()).hexdigest()[:12]
    assert set(own["pretrained"]) == {f"file {digest}"}
    assert runs["superseded_by"].isna().all()
    client = tracking.open_store(uri).client
    params = [client.get_run(run_id).data.params for run_id in fresh["run_id"]]
    assert not any({"pretrained", "freeze", "normalisation"} & each.keys() for each in params)
    network = own[own["model"] == "timm:test_resnet.r160_in1k"].iloc[0]
    assert client.get_run(network["run_id"]).data.params["normalisation"].count(";") == 1
    checkpoint = torch.load(analysis.local_artifact(network, keys.CHECKPOINT, uri), weights_only=True)
    first = torch.load(folder / "own.pt", weights_only=True)
    head = {"network.fc.weight", "network.fc.bias"}
    for key, value in checkpoint["state_dict"].items():
        assert key in head or torch.equal(value, first[key.removeprefix("network.")]), key


@pytest.mark.slow
def test_every_command_knows_them(trained: tuple[str, Path], tmp_path: Path) -> None:
    uri, folder = trained
    photo = folder / "photos" / "light" / "00.png"
    tex, page, export = tmp_path / "table.tex", tmp_path / "report.html", tmp_path / "export"
    for called, arguments in (
        (app, ("verify", "photos", "--data-dir", folder / "photos")),
        (app, ("predict", "photos", photo)),
        (analysis_app, ("table", "photos", "--out", tex)),
        (analysis_app, ("report", "photos", "--out", page)),
        (analysis_app, ("export", "photos", "--out", export)),
    ):
        result = CliRunner().invoke(called, [*map(str, arguments), "--tracking-uri", uri])
        assert result.exit_code == 0, result.output
        if "verify" in arguments:
            assert "6 runs" in result.output and " 0 differences" in result.output
    assert r"timm:test\_resnet.r160\_in1k" in tex.read_text()
    assert "Only the heads of these networks were trained" in page.read_text()
    names = {path.name for path in (export / "figures").iterdir()}
    assert any(name.startswith("confusion_timm-test_resnet.r160_in1k") for name in names)
    assert not any(":" in name for name in names)
    sentence = re.findall(r"These networks have seen other images before.*?\)\.", page.read_text())[0]
    assert "timm:test_resnet.r160_in1k (file " in sentence
    assert "--weights FILE --freeze" in page.read_text()
