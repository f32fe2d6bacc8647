"""Kernels compute what torch computes in float64; steps of models on them are those of their layers."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import kernels
from models.efficientnet import MBConv
from models.execution.convolutions import CL
from models.execution.training import Training
from models.layers import ConvNorm, LayerStack, SqueezeExcitation
from models.resnet import ResidualBlock

if (reason := kernels.why_not()) and "imported" not in reason:
    pytest.skip(f"no kernels: {reason}", allow_module_level=True)

from models.kernels import depthwise, excitation, functions, normalisation

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The error is that of numbers of this kind; small values are judged by the size of the others."""
    assert torch.isfinite(ours).all()
    limit = 5e-6 if dtype == torch.float32 else 4e-3
    assert (ours.double() - exact.double()).abs().max() <= 3 * limit * exact.abs().max() + 1e-30
    assert (ours.double() - exact.double()).norm() <= limit * exact.double().norm() + 1e-30


def maps(n: int, c: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, c, height, width) + 1).to(dtype).contiguous(memory_format=CL)


def by_channel(values: Tensor) -> Tensor:
    return values.double().view(1, -1, 1, 1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_moments_of_images(dtype: torch.dtype, shift: float) -> None:
    z = maps(3, 48, 5, 31, torch.float32).add(shift).to(dtype).contiguous(memory_format=CL)
    parts, pixels = functions.moments(z)
    exact = z.double()
    assert pixels == 5 * 31
    close(parts[:, 0], exact.mean((2, 3)))
    close(parts[:, 1], exact.var((2, 3), correction=0) * pixels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "height", "width"), [(16, 7, 9), (24, 6, 5), (80, 40, 33)])
@pytest.mark.parametrize("activation", ["none", "relu", "swish"])
def test_normalisation(activation: str, channels: int, height: int, width: int, dtype: torch.dtype) -> None:
    f = {"none": lambda x: x, "relu": F.relu, "swish": F.silu}[activation]
    layer = nn.BatchNorm2d(channels).train()
    nn.init.uniform_(layer.weight, -1, 1)
    nn.init.normal_(layer.bias)
    theirs = copy.deepcopy(layer).double()
    z, g = maps(3, channels, height, width, dtype), maps(3, channels, height, width, dtype)
    exact = z.double().requires_grad_()
    out = f(theirs(exact))
    out.backward(g.double())
    norm = functions.normalise(*functions.moments(z), layer)
    close(functions.apply(z, norm.scale, norm.shift, activation), out, dtype)
    sums, _ = functions.gradient_sums(g, z, norm, activation)
    grad_gamma, grad_beta, pqr = functions.denormalise(sums, functions.count_of(z), norm)
    limit = torch.float32 if activation != "swish" else dtype  # its derivative is as exact as the numbers are
    close(grad_gamma, theirs.weight.grad, limit)
    close(grad_beta, theirs.bias.grad, limit)
    close(functions.gradient(g, z, norm, pqr, activation), exact.grad, dtype)
    close(layer.running_mean, theirs.running_mean)
    close(layer.running_var, theirs.running_var)
    assert layer.num_batches_tracked == theirs.num_batches_tracked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", [(6, 8), (7, 5), (2, 3)])
def test_pooling_gives_the_gradient_to_the_first_of_equal_pixels(sides: tuple[int, int], dtype: torch.dtype) -> None:
    z = maps(4, 32, *sides, dtype).mul(2).round().div(2)  # many are equal
    scale, shift, mean, q, r = torch.randn(5, 32)
    exact = (z.double() * by_channel(scale) + by_channel(shift)).requires_grad_()
    out = F.max_pool2d(exact.relu(), 2)
    g = maps(4, 32, *out.shape[2:], dtype)
    out.backward(g.double())
    size, n = DTYPES[dtype], len(z)
    y = torch.empty_like(g)
    normalisation.pool(size).launch(n, *sides, 32, z, torch.stack([scale, shift]), y)
    close(y, out, dtype)
    sums = torch.empty(n, 2, 32)
    normalisation.pool_sums(size).launch(n, *sides, 32, g, z, torch.stack([scale, shift, mean]), sums)
    close(sums[:, 0], exact.grad.sum((2, 3)))
    close(sums[:, 1], (exact.grad * (z.double() - by_channel(mean))).sum((2, 3)))
    gz = torch.empty_like(z)
    factors = torch.stack([scale, shift, scale, q, r])
    normalisation.pool_gradient(size).launch(n, *sides, 32, g, z, factors, gz)
    close(gz, exact.grad * by_channel(scale) + by_channel(q) - by_channel(r) * z.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width"), [(3, 1, 5, 6), (3, 2, 8, 7), (5, 1, 3, 9), (5, 2, 7, 10), (5, 2, 1, 1)]
)
def test_depthwise_convolution(kernel: int, stride: int, height: int, width: int, dtype: torch.dtype) -> None:
    n, c, size = 2, 32, DTYPES[dtype]
    z1, weight, factors1, factors2 = maps(n, c, height, width, dtype), *torch.randn(3, 32, 25).split(1)
    weight = weight[0, :, : kernel**2].reshape(c, 1, kernel, kernel)
    factors1, factors2 = factors1[0].t()[:5].contiguous(), factors2[0].t()[:5].contiguous()
    taps = weight.view(c, -1).t().contiguous()
    before = (z1.double() * by_channel(factors1[0]) + by_channel(factors1[1])).requires_grad_()
    exact_weight = weight.double().requires_grad_()
    out = F.conv2d(F.silu(before), exact_weight, None, stride, kernel // 2, groups=c)
    sides, pixels = out.shape[2:], out[0, 0].numel()
    z2, parts = maps(n, c, *sides, dtype), torch.empty(n, 2, c)
    depthwise.forward(size, kernel, stride).launch(
        n * c // 16, height, width, c, *sides, z1, factors1, taps, z2, parts,
        scratch=depthwise.forward_scratch(kernel, height, width),
    )  # fmt: skip
    close(z2, out, dtype)
    close(parts[:, 0], out.mean((2, 3)), dtype)
    close(parts[:, 1] + 1, out.var((2, 3), correction=0) * pixels + 1, dtype)
    # the way back, from the gradient of silu(bn(z2)) * s
    g, per_image = maps(n, c, *sides, dtype), torch.randn(n, 2, c)
    inner = (z2.double() * by_channel(factors2[0]) + by_channel(factors2[1])).requires_grad_()
    s, through = per_image.double()[..., None, None].unbind(1)
    F.silu(inner).backward(g.double() * s + through)
    p, q, r = map(by_channel, factors2[2:])
    out.backward(p * inner.grad + q - r * z2.double())
    d1, sums, taps_sums = torch.empty_like(z1), torch.empty(n, 2, c), torch.empty(n, kernel**2, c)
    depthwise.backward(size, kernel, stride).launch(
        n * c // 16, height, width, c, *sides, g, z2, per_image, factors2, z1, factors1, taps, d1, sums, taps_sums,
        scratch=depthwise.backward_scratch(kernel, height, width),
    )  # fmt: skip
    close(d1, before.grad, dtype)
    close(taps_sums.sum(0).t().reshape_as(weight), exact_weight.grad, dtype)
    close(sums[:, 0], before.grad.sum((2, 3)), dtype)
    close(sums[:, 1], (before.grad * (z1.double() - by_channel(factors1[2]))).sum((2, 3)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squeeze_and_excitation(dtype: torch.dtype) -> None:
    n, c, bands, size = 2, 48, 4, DTYPES[dtype]
    z, g, s = maps(n, c, 12, 8, dtype), maps(n, c, 12, 8, dtype), torch.rand(n, c)
    factors = torch.randn(3, c)
    before = (z.double() * by_channel(factors[0]) + by_channel(factors[1])).requires_grad_()
    a = F.silu(before)
    [slope] = torch.autograd.grad(a.sum(), before)
    means, excited, again = torch.empty(n, c), torch.empty_like(z), torch.empty_like(z)
    excitation.means(size).launch(n, 96, c, z, factors, means)
    excitation.excite(size).launch(n * bands, bands, 24, c, z, factors, s, 4 * c, excited)
    sums = torch.empty(n * bands, 5, c)
    excitation.gradient_sums(size).launch(n * bands, bands, 24, c, g, z, factors, s, 4 * c, again, sums)
    close(means, a.mean((2, 3)), dtype)
    close(excited, a * s.double()[..., None, None], dtype)
    assert torch.equal(excited, again)
    d, v = g.double() * slope, z.double() - by_channel(factors[2])
    for ours, exact in zip(
        sums.view(n, bands, 5, c).sum(1).unbind(1), (g.double() * a, d, slope, d * v, slope * v), strict=True
    ):
        close(ours, exact.sum((2, 3)), dtype)


@pytest.mark.parametrize("size", [2, 4])
def test_sigmoid_of_all_sizes(size: int) -> None:
    x = torch.linspace(-120, 120, 1601).to(torch.float32 if size == 4 else torch.bfloat16)[:1600].contiguous()
    y = torch.empty_like(x)
    normalisation.apply(size, normalisation.SILU, 0).launch(
        1, 100, 16, x, torch.tensor([1.0] * 16 + [0.0] * 16), 0, None, y
    )
    torch.testing.assert_close(y, F.silu(x.double()).to(x.dtype), rtol=5e-6 if size == 4 else 8e-3, atol=1e-27)


class Stack(LayerStack):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


STACKS = {
    "relu": lambda: [ConvNorm(3, 32, 3), ConvNorm(32, 24, 3, 2)],
    "pool": lambda: [ConvNorm(3, 16, 3), nn.MaxPool2d(2), ConvNorm(16, 32, 3), nn.MaxPool2d(2)],
    "residual": lambda: [ConvNorm(3, 16, 3), ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2)],
    "excited": lambda: [ConvNorm(3, 16, 3), ResidualBlock(16, 16, 1, 4), ResidualBlock(16, 32, 2, 4)],
    "no expansion": lambda: [ConvNorm(3, 32, 3, 2, activation=nn.SiLU), MBConv(32, 16, 3, 1, 1, 0.0)],
    "bottleneck": lambda: [ConvNorm(3, 24, 3, 2), MBConv(24, 24, 3, 1, 2, 0.0), MBConv(24, 40, 5, 2, 4, 0.0)],
    "stochastic depth": lambda: [ConvNorm(3, 24, 3, 2), MBConv(24, 24, 5, 1, 2, 0.5)],
    "excitation alone": lambda: [ConvNorm(3, 24, 3), SqueezeExcitation(24, 4)],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
def test_a_step_is_that_of_the_layers(layers, dtype: torch.dtype) -> None:
    """In fp32 to the last digits, which torch's own BatchNorm is not; in bf16 as near as autocast is."""
    exact = Stack(*layers()).to(memory_format=CL).double().train()
    plain, model = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    fast = Training(model, dtype)
    assert fast.with_kernels
    x = maps(6, 3, 14, 18, torch.float32).to(dtype)
    g = torch.randn_like(exact(x.double()))
    exact.load_state_dict(plain.state_dict())  # running statistics
    outs = []
    for run, inputs in ((exact, x.double()), (plain, x), (fast, x)):
        torch.manual_seed(1)  # of stochastic depth
        with torch.autocast("cpu", dtype, enabled=run is plain and dtype == torch.bfloat16):
            outs.append(run(inputs))
        (outs[-1] * g).sum().backward()
    assert outs[2].dtype == dtype
    largest = max(parameter.grad.norm() for parameter in exact.parameters())
    for true, usual, ours in zip(exact.parameters(), plain.parameters(), model.parameters(), strict=True):
        # a gradient that is 0 but for rounding is judged by the size of the others
        size = true.grad.norm() + 0.1 * largest
        usual_error = (usual.grad.double() - true.grad).norm() / size if dtype == torch.bfloat16 else 0
        assert (ours.grad.double() - true.grad).norm() / size < 1.5 * usual_error + (
            1e-5 if dtype == torch.float32 else 0.01
        )
    limit = 1e-5 if dtype == torch.float32 else 0.03
    for true, ours in zip([outs[0], *exact.buffers()], [outs[2], *model.buffers()], strict=True):
        assert (ours.double() - true).norm() <= limit * true.double().norm()


@pytest.mark.parametrize("layers", [STACKS["pool"], STACKS["excited"], STACKS["bottleneck"]])
def test_any_number_of_threads_gives_the_same_bits(layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels; convolutions and matrix products, which are not ours, are done by one thread here."""
    model = Stack(*layers()).to(memory_format=CL).train()
    x = maps(7, 3, 32, 32, torch.float32)
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)  # what launches ask
            model.zero_grad()
            Training(model, torch.float32)(x).square().sum().backward()
            results.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    finally:
        monkeypatch.undo()
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("version", "reason"), [
    ("0.61.2", "numba 0.61.2 is older than 0.62"), ("0.62.0rc1", ""), ("1.0.0", ""),
])  # fmt: skip
def test_versions_of_numba_that_refuse_bf16_are_not_used(
    version: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.metadata, "version", lambda package: version)
    assert kernels.why_not.__wrapped__() == reason


@pytest.mark.parametrize("folder", ["benchmarks", "experiments"])
def test_no_script_hides_a_module_that_numba_imports(folder: str) -> None:
    """A script's folder comes first where Python looks for modules; numba imports `coverage`, for example."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; from models import kernels; print(kernels.why_not())"
    command = [sys.executable, "-c", code, str(ROOT / folder)]
    assert not subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


STARTS = """
import contextlib, io, json, multiprocessing, os, sys, types
from pathlib import Path
import torch
from torch import nn
from models import kernels
from models.execution.training import Training
from models.layers import ConvNorm, LayerStack

BROKEN = {
    "broken 1": ("numba", "ImportError('Numba needs NumPy 2.2 or less')"),
    "broken 2": ("numba", "SystemError('initialization of _internal failed\\\\nwithout an exception')"),
    "broken 3": ("llvmlite", "OSError('cannot load libllvmlite.so')"),
}

class One(LayerStack):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([ConvNorm(3, 16, 3)])

def step(case):
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        if case == "without numba":
            sys.modules["numba"] = None
        elif case == "turned off":
            os.environ["NUMBA_DISABLE_JIT"] = "1"
        elif case == "without torch's threads":
            kernels.sys = types.SimpleNamespace(platform="darwin")
        elif case.startswith("broken"):
            package, error = BROKEN[case]
            (Path(sys.argv[1]) / case / package).mkdir(parents=True)
            (Path(sys.argv[1]) / case / package / "__init__.py").write_text(f"raise {error}")
            sys.path.insert(0, str(Path(sys.argv[1]) / case))
        else:
            from models.kernels import launch
            launch.FOLDER = Path("/proc/beside the source")
            os.environ["XDG_CACHE_HOME"] = "/proc" if case == "read only" else sys.argv[1]
        total = Training(One(), torch.float32)(torch.randn(2, 3, 8, 8)).double().sum().item()
    return total, kernels.why_not(), said.getvalue()

with multiprocessing.get_context("fork").Pool(4, maxtasksperchild=1) as pool:  # a new process for each
    results = {"cold": pool.map(step, ["cold"] * 4, chunksize=1)}
    for case in ("warm", "read only", "without numba", "turned off", "without torch's threads", *BROKEN):
        results[case] = pool.map(step, [case])[0]
print(json.dumps(results))
"""


@pytest.mark.slow
def test_kernels_are_compiled_once_and_missed_by_nobody(tmp_path: Path) -> None:
    """Four processes on a cold cache; on a warm one; on one that cannot be written; without numba, or a broken one."""
    command = [sys.executable, "-c", STARTS, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    total, reason, said = results["warm"]
    assert not reason and not said
    (folder,) = (tmp_path / "image-classifiers").iterdir()
    assert {file.stem for file in folder.glob("*.done")} == {"normalisation.moments.4", "normalisation.apply.4.1.0"}
    assert [each[0] for each in results["cold"]] == [total] * 4  # the same bits
    assert any("compiling kernels for this processor, once" in each[2] for each in results["cold"])
    assert results["read only"][0] == total
    assert "in every process, since no folder" in results["read only"][2]
    reasons = {
        "without numba": "numba is not installed",
        "turned off": "NUMBA_DISABLE_JIT is set",
        "without torch's threads": "torch's threads cannot be reached on this system",
        "broken 1": "numba cannot be imported (ImportError: Numba needs NumPy 2.2 or less)",
        "broken 2": "numba cannot be imported (SystemError: initialization of _internal failed without an exception)",
        "broken 3": "numba cannot be imported (OSError: cannot load libllvmlite.so)",
    }
    for case, why in reasons.items():
        assert results[case] == [pytest.approx(total, rel=1e-4), why, ""], case
