"""Weights that a training begins with: a library's own, which were trained on other images, or those of a file."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor, nn

from models import library
from models.freezing import HeadOnly, head_of
from models.registry import ModelError, build

LIBRARY, FILE = "library", "file"  # first words of a label
PATIENCE = 5  # seconds that a host of weights may take to answer
SHOWN_KEYS = 3  # of those that do not fit


@dataclass(frozen=True)
class InitialWeights:
    """Weights that fit a model; the rest of it, such as a head for other classes, begins fresh."""

    label: str  # `library: name, digest` or `file digest`
    state: Mapping[str, np.ndarray]  # entries of the model's state dict
    normalisation: str  # see `parse_normalisation`; empty: that of the training part
    left_out: str  # what stays fresh, for people; empty: nothing

    def load_into(self, model: nn.Module) -> None:
        """Replace the weights of a model from `build`."""
        network = model.network if isinstance(model, HeadOnly) else model
        network.load_state_dict({key: torch.tensor(value) for key, value in self.state.items()}, strict=False)


def parse_normalisation(text: str) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, float32, in units of 0 to 255, from `means; deviations`."""
    mean, std = (torch.tensor([float(number) for number in part.split()]) for part in text.split(";"))
    return mean, std


def why_unavailable(name: str) -> str:
    """Say why no library's weights can be had for a model now; empty if they can, or nothing is known against it."""
    if not library.is_library_model(name):
        return f"no library has weights for {name}; leave --pretrained out, or name a file in --weights"
    if unknown := library.why_unknown(name):
        return unknown
    kind, _, architecture = name.partition(":")
    nothing = f"{kind} has no weights for {name}; leave --pretrained out, or name a file in --weights"
    if kind == "torchvision":
        from torchvision.models import get_model_weights

        if not len(offered := get_model_weights(architecture)):
            return nothing
        url = offered.DEFAULT.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
        if path.is_file() or _is_reachable(url):
            return ""
        return _out_of_reach(name, url, f"TORCH_HOME, whose hub/checkpoints/ holds {path.name}")
    import huggingface_hub.constants as hub
    from huggingface_hub.file_download import repo_folder_name
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(architecture)
    if config is None or not config.has_weights:
        return nothing
    if not config.hf_hub_id or (not hub.HF_HUB_OFFLINE and _is_reachable(hub.ENDPOINT)):
        return ""
    folder = Path(hub.HF_HUB_CACHE) / repo_folder_name(repo_id=config.hf_hub_id, repo_type="model")
    return "" if folder.is_dir() else _out_of_reach(name, hub.ENDPOINT, f"HF_HOME, whose hub/ holds {folder.name}")


def from_library(name: str, in_channels: int, num_classes: int, image_size: int) -> InitialWeights:
    """Load the weights that a library offers for its architecture, from its cache or the internet.

    Raises
    ------
    ModelError
        There are none, they cannot be had now, or they do not fit.
    """
    if reason := why_unavailable(name):
        raise ModelError(reason)
    model = build(name, in_channels, num_classes, image_size)
    load = _from_timm if name.startswith("timm:") else _from_torchvision
    called, state = load(name, in_channels, num_classes, image_size)
    fitting, left_out = _fit(name, model, state, f"the weights {called}")
    label = f"{LIBRARY}: {called}, {_digest(fitting)[:12]}"
    return InitialWeights(label, fitting, _normalisation(name, in_channels), left_out)


def from_file(path: Path, name: str, in_channels: int, num_classes: int, image_size: int) -> InitialWeights:
    """Read a state dict, or the checkpoint of a run, from a safetensors or PyTorch file. No code in it is executed.

    Raises
    ------
    ModelError
        The file cannot be read, or does not fit the model.
    """
    model = build(name, in_channels, num_classes, image_size)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"--weights: {path} cannot be read ({error.strerror or error})") from None
    if other := _other_than_weights(data):
        raise ModelError(f"--weights: {path} is {other}")
    digest = hashlib.sha256(data).hexdigest()
    del data  # as large as what is read next
    try:
        content = _read(path)
    except Exception as error:  # noqa: BLE001 - readers raise whatever a damaged or foreign file makes them trip over
        if type(error).__name__ == "UnpicklingError":  # torch refuses all but tensors
            sentence = f"--weights: {path} is no file of tensors, or would execute code as it is read"
            raise ModelError(sentence) from None
        raise ModelError(f"--weights: {path} cannot be read as a state dict ({_first_words(error)})") from None
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        sentence = f"--weights: {path} holds no state dict: names with tensors, and nothing else"
        raise ModelError(f"{sentence}; its names are {_some([*map(str, content)], ', ')}")
    if all(key.startswith("network.") for key in state):  # of a run with --freeze
        state = {key.removeprefix("network."): value for key, value in state.items()}
    fitting, left_out = _fit(name, model, state, str(path))
    if {"mean", "std"} <= content.keys() and len(content["mean"]) == in_channels:  # a checkpoint of a run
        normalisation = _format_normalisation(content["mean"], content["std"])
    else:
        normalisation = _normalisation(name, in_channels) if library.is_library_model(name) else ""
    return InitialWeights(f"{FILE} {digest[:12]}", fitting, normalisation, left_out)


def _other_than_weights(data: bytes) -> str:
    """Recognise a Git LFS pointer or a web page saved in place of weights, and say what to do; empty for others."""
    start = data[:100].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights; `git lfs pull` fetches them"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the weights; download the file itself"
    return ""


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    if not path.stat().st_size:
        raise EOFError("it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other pickles than torch's own: it refuses what it cannot read
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return content


def _fit(name: str, model: nn.Module, state: Mapping[str, Tensor], source: str) -> tuple[dict[str, np.ndarray], str]:
    """Return the entries that a model takes, and which it does without; `ModelError` if others do not fit.

    A head for another number of classes is left out, and RGB weights of the first convolution are summed for gray.
    """
    expected = model.state_dict()
    heads = tuple(f"{head}." for head in head_of(model))
    first = next((f"{key}.weight" for key, layer in model.named_modules() if isinstance(layer, nn.Conv2d)), "")
    fitting, fresh = {}, []
    strange = [key for key in state if key not in expected and not key.startswith(heads)]
    problems = [f"{key} is unknown to the model" for key in strange]
    for key, own in expected.items():
        value = state.get(key)
        if value is not None and key == first and value.ndim == 4 and (value.shape[1], own.shape[1]) == (3, 1):
            value = library.sum_of_channels(value)
        if value is not None and value.shape == own.shape:
            if own.is_floating_point() and not (value.is_floating_point() and value.to(own.dtype).isfinite().all()):
                problems.append(f"{key} holds whole numbers, infinity or NaN")
            fitting[key] = value.to(own.dtype).numpy()
        elif key.startswith(heads):
            fresh.append(key)
        elif value is not None:
            problems.append(f"{key} has shape {tuple(value.shape)}, not {tuple(own.shape)}")
        elif not key.endswith("num_batches_tracked"):  # a count that no result depends on
            problems.append(f"{key} is missing")
    if problems:
        raise ModelError(f"{source} does not fit {name}: {_some(problems, '; ')}")
    return fitting, f"{', '.join(fresh)}, which is for other classes" if fresh else ""


def _some(texts: list[str], between: str) -> str:
    more = [f"and {len(texts) - SHOWN_KEYS} more"] if len(texts) > SHOWN_KEYS else []
    return between.join(texts[:SHOWN_KEYS] + more)


def _digest(state: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for key, value in sorted(state.items()):
        total.update(f"{key} {value.dtype} {value.shape}\0".encode())
        total.update(np.ascontiguousarray(value).data)
    return total.hexdigest()


def _from_torchvision(name: str, in_channels: int, num_classes: int, image_size: int) -> tuple[str, dict[str, Tensor]]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name.partition(":")[2]).DEFAULT
    with _one_sentence(name):
        return str(weights), dict(weights.get_state_dict(progress=False, check_hash=True))


def _from_timm(name: str, in_channels: int, num_classes: int, image_size: int) -> tuple[str, dict[str, Tensor]]:
    import huggingface_hub.constants as hub
    from timm.models import get_pretrained_cfg

    architecture = name.partition(":")[2]
    config = get_pretrained_cfg(architecture)
    assert config is not None  # as `why_unavailable` has seen
    states = []
    # it would ask for 47 seconds before it looks into its cache
    with _hub_offline(hub.HF_HUB_OFFLINE or not _is_reachable(hub.ENDPOINT)), _one_sentence(name):
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = library._build_timm(architecture, in_channels, num_classes, image_size, pretrained=True)
            states.append(model.state_dict())
    # timm leaves what it lacks as it was drawn, without a word: such entries differ
    one, other = states
    found = {key: value for key, value in one.items() if torch.equal(value, other[key])}
    return f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture), found


def _first_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0][:120]}"


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn an error of the network, or of a damaged file, into a `ModelError`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - libraries raise whatever they trip over
        raise ModelError(f"the weights of {name} cannot be loaded ({_first_words(error)})") from None


@cache
def _is_reachable(url: str) -> bool:
    """Whether the host of an address answers, whatever it says."""
    import requests

    place = urlsplit(url)
    try:
        requests.head(f"{place.scheme}://{place.netloc}", timeout=PATIENCE)
    except requests.RequestException:
        return False
    return True


def _out_of_reach(name: str, url: str, place: str) -> str:
    return (
        f"the weights of {name} are not on this machine, and {urlsplit(url).netloc} cannot be reached; name a file of "
        f"them in --weights FILE, or a folder in {place}"
    )


@contextlib.contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Set the switch of Hugging Face's client, which it reads from the environment only once."""
    import huggingface_hub.constants as hub

    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, offline
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _normalisation(name: str, in_channels: int) -> str:
    """Return the mean and std that a library's weights expect, as text; empty if none are stated."""
    library_name, _, architecture = name.partition(":")
    if library_name == "timm":
        from timm.models import get_pretrained_cfg

        expects = get_pretrained_cfg(architecture)
    else:
        from torchvision.models import get_model_weights

        offered = get_model_weights(architecture)
        expects = offered.DEFAULT.transforms() if len(offered) else None
    if expects is None:
        return ""
    channels = [255 * torch.tensor(values) for values in (expects.mean, expects.std)]
    return _format_normalisation(*(values if in_channels == 3 else values.mean()[None] for values in channels))


def _format_normalisation(mean: Tensor, std: Tensor) -> str:
    return "; ".join(" ".join(f"{value:.9g}" for value in part.tolist()) for part in (mean, std))
