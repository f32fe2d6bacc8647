"""The loop: it learns, stops early, keeps the best, repeats itself, and says when it fails."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score
from torch.nn.functional import cross_entropy

import models
from datasets import ImageData, RepeatedHoldout, Split
from experiments import TrainingConfig
from experiments.training import hardware
from experiments.training.evaluation import evaluate
from experiments.training.fit import TrainingDivergedError, fit
from experiments.training.images import DeviceImages, Part, plan_epoch, split_batches
from experiments.training.state import TrainingState
from tracking import SettingError
from tracking.checkpoints import load_resume_file, save_resume_file

CONFIG = TrainingConfig(lr=3e-3, batch_size=16, epochs=4, precision="fp32", device="cpu")
PRECISIONS = [("lenet5", "fp32"), ("lenet5", "bf16"), ("lenet5", "fp16")]  # a CPU takes minutes for others in fp16


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Three classes: a bright bar at the top, in the middle, at the bottom; noise over all."""
    rng = np.random.default_rng(0)
    labels = np.arange(180) % 3
    images = rng.integers(0, 90, (180, 28, 28, 1))
    for image, label in zip(images, labels, strict=True):
        image[4 + 8 * label : 10 + 8 * label] += 120
    return ImageData("bars", images.astype(np.uint8), labels, ("top", "middle", "bottom"), 180)


@pytest.fixture(scope="module")
def split(data: ImageData) -> Split:
    return RepeatedHoldout(1, (3, 1, 1)).split(data.labels, 0)[0]


def few(split: Split) -> Split:
    """The split with 32 training images, for large models."""
    return split._replace(train=split.train[:32])


def new_model(name: str = "lenet5") -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(name, 1, 3, 28).to(memory_format=torch.channels_last)


def run(data: ImageData, split: Split, config: TrainingConfig = CONFIG, name: str = "lenet5", seed: int = 1):
    model = new_model(name)
    records = list(fit(TrainingState(model, config, seed), DeviceImages.load(data, "cpu"), split))
    return model, records


@pytest.mark.parametrize(("name", "precision"), [*PRECISIONS, ("resnetcnn", "fp32"), ("resnetcnn", "bf16")])
def test_learns_what_can_be_learned(data: ImageData, split: Split, name: str, precision: str) -> None:
    config = dataclasses.replace(CONFIG, precision=precision, augment=False, epochs=8 if name == "lenet5" else 4)
    _, records = run(data, split, config, name)
    assert records[-1].train_loss < 0.5 * records[0].train_loss
    assert max(record.val.scores()["accuracy"] for record in records) > 0.9
    assert [record.epoch for record in records] == list(range(1, len(records) + 1))
    assert all(record.seconds > 0 for record in records)


def test_cosine_schedule(data: ImageData, split: Split) -> None:
    _, records = run(data, split)
    expected = [CONFIG.lr * (1 + math.cos(math.pi * i / CONFIG.epochs)) / 2 for i in range(CONFIG.epochs)]
    assert [record.lr for record in records] == pytest.approx(expected)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_streamed_images_give_the_same_bits(data: ImageData, split: Split, precision: str, augment: bool) -> None:
    config = dataclasses.replace(CONFIG, precision=precision, augment=augment, epochs=2)
    results = []
    for memory in (1.0, 0.0):
        images = DeviceImages.load(data, "cpu", memory)
        assert images.resident == (memory > 0)
        records = list(fit(TrainingState(new_model(), config, 1), images, split))
        results.append([(r.train_loss, r.val.loss, r.val.probability.tolist()) for r in records])
    assert results[0] == results[1]


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("name", ["lenet5", "efficientnet_b0"])  # B0 draws dropout and stochastic depth
def test_same_seed_same_bits(data: ImageData, split: Split, name: str, augment: bool) -> None:
    config = dataclasses.replace(
        CONFIG, augment=augment, epochs=2, precision=hardware.resolve(TrainingConfig()).precision
    )
    first, second, other = (run(data, few(split), config, name, seed) for seed in (1, 1, 2))
    for a, b in zip(first[1], second[1], strict=True):
        assert (a.train_loss, a.val.loss, a.val.scores()) == (b.train_loss, b.val.loss, b.val.scores())
        assert torch.equal(a.val.probability, b.val.probability)
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first[1][0].train_loss != other[1][0].train_loss


@pytest.mark.parametrize(
    ("name", "precision"), [*PRECISIONS, ("efficientnet_lite", "fp32"), ("efficientnet_lite", "bf16")]
)
def test_goes_on_from_any_epoch_with_the_same_bits(
    data: ImageData, split: Split, name: str, precision: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, precision=precision, augment=True, patience=1, lr=1e-2)  # stopped early
    if name != "lenet5":  # not stopped early
        split, config = few(split), dataclasses.replace(config, patience=9, epochs=3)
    whole, records = run(data, split, config, name)
    images = DeviceImages.load(data, "cpu")
    stopped = TrainingState(new_model(name), config, 1)
    seen = []
    for _ in records:  # each epoch, and what follows the last, by another process's state
        state = TrainingState(new_model(name), config, seed=99)
        if seen:
            torch.rand(3)  # whatever a new process draws
            state.load_state_dict(load_resume_file(tmp_path / "split.resume"))
        else:
            state = stopped
        seen.append(next(fit(state, images, split)))
        save_resume_file(tmp_path / "split.resume", state.state_dict())
    state = TrainingState(new_model(name), config, seed=99)
    state.load_state_dict(load_resume_file(tmp_path / "split.resume"))
    assert list(fit(state, images, split)) == []  # it was done
    for a, b in zip(records, seen, strict=True):
        assert (a.epoch, a.lr, a.train_loss, a.improved) == (b.epoch, b.lr, b.train_loss, b.improved)
        assert torch.equal(a.val.probability, b.val.probability)
    best = [record for record in records if record.improved][-1]
    kept = state.chosen[0].val
    assert state.best_epoch == best.epoch
    assert kept.scores() == best.val.scores() and torch.equal(kept.log_probs, best.val.log_probs)
    for place, half in ((1, 1), (2, 0)):  # the epochs that score a half are those with the lowest loss of the other
        expected = min(records, key=lambda record: record.half_losses[half])
        assert state.chosen[place].epoch == expected.epoch
        assert torch.equal(state.chosen[place].val.log_probs, expected.val.log_probs)
    for a, b in zip(whole.state_dict().values(), state.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lenet5", "efficientnet_lite"])
def test_restarted_state_trains_as_a_new_one(data: ImageData, split: Split, name: str) -> None:
    """One model serves all splits on a GPU: nothing of a split may be left in the next."""
    split, config = few(split), dataclasses.replace(CONFIG, epochs=2)
    images = DeviceImages.load(data, "cpu")
    used = TrainingState(new_model(name), config, 1)
    list(fit(used, images, Split(split.val, split.train, split.test)))
    used.restart(new_model(name), 2)
    results = []
    for state in (used, TrainingState(new_model(name), config, 2)):
        records = list(fit(state, images, split))
        results.append([(r.lr, r.train_loss, r.val.loss, r.val.probability.tolist()) for r in records])
    assert results[0] == results[1]
    for a, b in zip(used.model.state_dict().values(), state.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["lenet5", "vggnet", "efficientnet_lite"])
def test_recorded_passes_give_the_bits_of_those_that_are_not(data: ImageData, split: Split, name: str) -> None:
    hardware.prepare()
    config = dataclasses.replace(CONFIG, device="cuda", precision="bf16", augment=True)
    images = DeviceImages.load(data, "cuda")
    recorded = TrainingState(new_model(name).cuda(), config, 1)
    list(fit(recorded, images, Split(split.train[:-1], split.val, split.test)))  # batches of other sizes
    assert recorded.recordable
    recorded.restart(new_model(name).cuda(), 2)
    plain = TrainingState(new_model(name).cuda(), config, 2)
    plain.recordable = False
    first, second = (list(fit(state, images, split)) for state in (recorded, plain))
    for a, b in zip(first, second, strict=True):
        assert (a.train_loss, a.val.loss) == (b.train_loss, b.val.loss)
        assert torch.equal(a.val.probability, b.val.probability)


def test_part_is_filled_with_other_images_in_place(data: ImageData, split: Split) -> None:
    images = DeviceImages.load(data, "cpu")
    moments = images.normalisation(split.train)
    part = Part(images, split.val, *images.normalisation(split.val), torch.float32, keep=True)
    [before] = part.slices(1000)
    address = before.data_ptr()
    part.fill(split.test, *moments)
    [after] = part.slices(1000)
    [expected] = Part(images, split.test, *moments, torch.float32).slices(1000)
    assert after.data_ptr() == address
    assert torch.equal(after, expected) and torch.equal(part.labels, images.labels[torch.from_numpy(split.test)])
    assert torch.equal(part.exact(torch.arange(3)), expected[:3])


def test_damaged_resume_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "split.resume"
    assert load_resume_file(path) is None
    save_resume_file(path, {"epoch": 3, "weights": torch.arange(1000.0)})
    assert load_resume_file(path)["epoch"] == 3
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content[:500] + bytes([content[500] ^ 1]) + content[501:]):
        path.write_bytes(damaged)
        assert load_resume_file(path) is None


def test_augmentation_is_switched_by_its_setting(data: ImageData, split: Split) -> None:
    losses = [
        run(data, split, dataclasses.replace(CONFIG, augment=augment, epochs=1))[1][0].train_loss
        for augment in (False, True)
    ]
    assert losses[0] != losses[1]


def test_stops_early_and_keeps_the_best(data: ImageData, split: Split) -> None:
    noise = np.random.default_rng(1).permutation(data.labels)  # nothing to learn: validation loss soon rises
    shuffled = dataclasses.replace(data, labels=noise)
    config = dataclasses.replace(CONFIG, epochs=60, patience=3)
    model, records = run(shuffled, split, config)
    losses = [record.val.loss for record in records]
    best = int(np.argmin(losses))
    assert len(records) == best + 1 + config.patience < config.epochs
    assert [record.improved for record in records] == [
        loss < min(losses[:i], default=math.inf) for i, loss in enumerate(losses)
    ]
    images = DeviceImages.load(shuffled, "cpu")
    again = evaluate(model, images, split.val, *images.normalisation(split.train), "fp32")
    assert again.scores() == records[best].val.scores()
    assert torch.equal(again.predicted, records[best].val.predicted)
    assert torch.equal(again.probability, records[best].val.probability)


def test_evaluation_equals_a_plain_one(data: ImageData, split: Split) -> None:
    model, _ = run(data, split)
    images = DeviceImages.load(data, "cpu")
    result = evaluate(model, images, split.test, *images.normalisation(split.train), "fp32")
    pixels = data.images.astype(np.float64) / 255
    mean, std = pixels[split.train].mean(), pixels[split.train].std()
    x = torch.from_numpy((pixels[split.test] - mean) / std).float().permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(data.labels[split.test])
    with torch.no_grad():
        logits = model.eval()(x)
    assert torch.equal(result.predicted, logits.argmax(1))
    assert result.loss == pytest.approx(cross_entropy(logits, y).item(), rel=1e-4)
    torch.testing.assert_close(result.probability, logits.softmax(1).max(1).values, rtol=1e-3, atol=1e-4)
    assert np.array_equal(result.confusion, confusion_matrix(y, logits.argmax(1), labels=[0, 1, 2]))
    assert result.scores()["f1_macro"] == pytest.approx(f1_score(y, logits.argmax(1), average="macro"), abs=1e-12)


@pytest.mark.parametrize("name", ["lenet5", "resnetcnn"])
def test_predictions_in_bf16_are_those_in_fp32(data: ImageData, split: Split, name: str) -> None:
    noisy = np.random.default_rng(3).integers(0, 256, (4000, 28, 28, 1)).astype(np.uint8)  # all of them close calls
    many = ImageData("noise", noisy, np.arange(4000) % 3, data.classes, 4000)
    model, _ = run(data, split, dataclasses.replace(CONFIG, precision="bf16", epochs=2), name)
    images = DeviceImages.load(many, "cpu")
    moments = images.normalisation(np.arange(4000))
    low, full = (evaluate(model, images, np.arange(4000), *moments, precision) for precision in ("bf16", "fp32"))
    assert (low.predicted == full.predicted).float().mean() >= 0.999
    assert low.loss == pytest.approx(full.loss, abs=2e-3)
    differ = low.predicted != full.predicted
    assert (low.probability - full.probability)[~differ].abs().max() < 0.02


def test_normalisation_is_that_of_the_training_part_alone(data: ImageData, split: Split) -> None:
    images = DeviceImages.load(data, "cpu")
    mean, std = images.normalisation(split.train)
    pixels = data.images[split.train].astype(float)
    assert mean.item() == pytest.approx(pixels.mean(), rel=1e-6)
    assert std.item() == pytest.approx(pixels.std(), rel=1e-6)
    flat = dataclasses.replace(data, images=np.full_like(data.images, 7))
    mean, std = DeviceImages.load(flat, "cpu").normalisation(split.train)
    assert (mean.item(), std.item()) == (7, 1)


def test_augmentation_moves_and_flips_but_keeps_the_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    images = DeviceImages.load(ImageData("one", pixels, np.array([0]), ("a",), 1), "cpu")
    part = Part(images, np.array([0]), torch.zeros(3), torch.ones(3), torch.float32, keep=True)

    def augmented(down: int, right: int, flip: int) -> np.ndarray:
        [(x, _)] = part.batches([torch.tensor([[0, down, right, flip]])], augment=True)
        return x[0].permute(1, 2, 0).numpy()

    padded = np.pad(pixels[0], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    assert np.array_equal(augmented(0, 0, 0), pixels[0])
    assert np.array_equal(augmented(0, 0, 1), pixels[0][:, ::-1])
    assert np.array_equal(augmented(2, -1, 0), padded[4:20, 1:17])
    assert np.array_equal(augmented(-2, 2, 0), padded[0:16, 4:20])


def test_plan_holds_every_image_once_and_is_drawn_from_the_generator() -> None:
    plans = [plan_epoch(100, 128, True, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert sorted(plans[0][:, 0].tolist()) == list(range(100))
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])
    assert plans[0][:, 1:3].abs().max() <= 16 and plans[0][:, 3].float().mean() == pytest.approx(0.5, abs=0.2)
    assert plan_epoch(100, 128, False, torch.Generator())[:, 1:].abs().sum() == 0


@pytest.mark.parametrize(("n", "sizes"), [(8, [4, 4]), (9, [3, 3, 3]), (10, [4, 3, 3]), (1, [1]), (3, [3])])
def test_batches_are_of_equal_size(n: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in split_batches(torch.zeros(n, 4), 4)] == sizes


def test_no_batch_of_one_image() -> None:
    for n in range(2, 40):
        for batch_size in range(2, 9):
            batches = split_batches(torch.arange(n), batch_size)
            assert torch.equal(torch.cat(batches), torch.arange(n))
            assert min(map(len, batches)) >= 2 and max(map(len, batches)) <= max(batch_size, 3)


def test_divergence_names_epoch_and_loss(data: ImageData, split: Split) -> None:
    with pytest.raises(TrainingDivergedError, match=r"loss is (nan|inf) in epoch \d; a lower --lr"):
        run(data, split, dataclasses.replace(CONFIG, lr=1e30))


def test_resolve() -> None:
    resolved = hardware.resolve(TrainingConfig())
    assert resolved.device in ("cpu", "cuda") and resolved.precision in ("fp32", "bf16", "fp16")
    assert hardware.resolve(dataclasses.replace(CONFIG, precision="fp16")).precision == "fp16"
    with pytest.raises(SettingError, match="^--device: 'gpu' is not a device that can be used .*; there are auto, cpu"):
        hardware.resolve(dataclasses.replace(CONFIG, device="gpu"))


def test_training_knows_nothing_of_mlflow() -> None:
    import subprocess
    import sys

    from tests.conftest import ROOT

    code = "import sys; sys.path.insert(0, '.'); import experiments.training; print('mlflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
