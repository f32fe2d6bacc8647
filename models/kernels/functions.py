"""Layers in training on these kernels, as autograd functions. Convolutions and matrix products stay with oneDNN."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from models.efficientnet import MBConv
from models.execution.convolutions import CL, Folding, Geometry, activation_of, convolution_gradients, convolve
from models.kernels import depthwise, excitation, normalisation
from models.kernels import stem as stems
from models.layers import ConvNorm, SqueezeExcitation

ACTIVATIONS = {"none": normalisation.NONE, "relu": normalisation.RELU, "swish": normalisation.SILU}
CHUNK = 2**21  # bytes of a chunk of images: what one kernel or matrix product writes, the next finds in the cache


class Batch(NamedTuple):
    """A map as kernels see it: items of `pixels` times `c` numbers, c a multiple of 16.

    Two pixels of 8 or 24 channels count as one of 16 or 48; `pair` is 2 then.
    """

    images: int
    pixels: int
    c: int
    pair: int
    size: int

    @classmethod
    def of(cls, z: Tensor) -> "Batch":
        """Describe a tensor (N, C, H, W) in channels_last memory."""
        n, c, h, w = z.shape
        pair = 1 if c % 16 == 0 else 2
        return cls(n, h * w // pair, c * pair, pair, z.element_size())

    def wide(self, factors: Tensor) -> Tensor:
        """Repeat factors of channels, shape (..., C), for both pixels of a pair."""
        return factors.repeat_interleave(1, 0) if self.pair == 1 else torch.cat([factors, factors], -1)

    def narrow(self, parts: Tensor) -> Tensor:
        """Sums of both pixels of a pair, shape (N, 2, c), as those of two groups of pixels: (N * pair, 2, C)."""
        if self.pair == 1:
            return parts
        n, k, c = parts.shape
        return parts.view(n, k, 2, c // 2).transpose(1, 2).reshape(2 * n, k, c // 2)


class Norm(NamedTuple):
    """What BatchNorm does to a batch, by channel: u = scale * z + shift (float32)."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor


def normalise(parts: Tensor, pixels: int, norm: nn.BatchNorm2d) -> Norm:
    """Batch statistics from the `moments` of groups of `pixels` pixels; moves the running statistics."""
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    assert norm.running_mean is not None and norm.running_var is not None
    means, squares = parts.double().unbind(1)
    mean = means.mean(0)
    squares = squares.sum(0) + pixels * (means - mean).square().sum(0)  # Chan, Golub and LeVeque 1983
    count = len(parts) * pixels
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.float(), norm.momentum)
    norm.running_var.lerp_((squares / max(count - 1, 1)).float(), norm.momentum)
    invstd = (squares / count + norm.eps).rsqrt()
    scale = norm.weight.detach() * invstd
    return Norm(scale.float(), (norm.bias.detach() - mean * scale).float(), mean.float(), invstd.float())


def denormalise(sums: Tensor, count: int, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gamma and beta from sums (groups, 2, C), and the factors p, q, r of `normalisation.gradient`."""
    s, t = sums.double().sum(0)
    scale, invstd = norm.scale.double(), norm.invstd.double()
    r = scale * invstd * invstd * t / count
    factors = torch.stack([scale, norm.mean * r - scale * s / count, r])
    return (t * invstd).float(), s.float(), factors.float()


def moments(z: Tensor) -> tuple[Tensor, int]:
    """`normalisation.moments` of the images of z, and the pixels that each is of."""
    batch = Batch.of(z)
    out = torch.empty(batch.images, 2, batch.c)
    normalisation.moments(batch.size).launch(batch.images, batch.pixels, batch.c, z, out)
    return batch.narrow(out), batch.pixels


def apply(z: Tensor, scale: Tensor, shift: Tensor, activation: str, other: Tensor | None = None) -> Tensor:
    """activation(scale * z + shift [+ other]); factors of shape (C,), or (N, C) if each image has its own."""
    batch, out = Batch.of(z), torch.empty_like(z)
    factors = batch.wide(torch.stack([scale, shift], -2))
    step = 8 * batch.c if factors.dim() == 3 else 0
    kernel = normalisation.apply(batch.size, ACTIVATIONS[activation], int(other is not None))
    kernel.launch(batch.images, batch.pixels, batch.c, z, factors, step, other, out)
    return out


def gradient_sums(g: Tensor, z: Tensor, norm: Norm, activation: str, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`normalisation.gradient_sums` of images, (N * pair, 2, C), and the gradient before a ReLU whose output is y."""
    batch = Batch.of(z)
    out, d = torch.empty(batch.images, 2, batch.c), g if y is None else torch.empty_like(z)
    factors = batch.wide(torch.stack([norm.scale, norm.shift, norm.mean]))
    kernel = normalisation.gradient_sums(batch.size, ACTIVATIONS[activation], int(y is not None))
    kernel.launch(batch.images, batch.pixels, batch.c, g, z, factors, 0, y, d, out)
    return batch.narrow(out), d


def gradient(g: Tensor, z: Tensor, norm: Norm, pqr: Tensor, activation: str = "none") -> Tensor:
    """`normalisation.gradient`; pqr: (3, C), or (N, 3, C) if each image has its own."""
    batch, out = Batch.of(z), torch.empty_like(z)
    first = torch.stack([norm.scale, norm.shift]).expand(*pqr.shape[:-2], 2, -1)
    factors = batch.wide(torch.cat([first, pqr], -2))
    step = 20 * batch.c if factors.dim() == 3 else 0
    kernel = normalisation.gradient(batch.size, ACTIVATIONS[activation])
    kernel.launch(batch.images, batch.pixels, batch.c, g, z, factors, step, out)
    return out


def count_of(z: Tensor) -> int:
    """Numbers of a channel."""
    return z.numel() // z.shape[1]


def conv_norm(layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Convolution, BatchNorm and activation; with `other`, its sum and ReLU instead of the activation."""
    out: Tensor = _ConvNorm.apply(*_folded(layer, x), other, layer, activation_of(layer) if other is None else "relu")
    return out


def conv_norm_pool(layer: ConvNorm, x: Tensor) -> Tensor:
    """Convolution, BatchNorm, ReLU and the maximum over 2x2 pixels."""
    out: Tensor = _ConvNormPool.apply(*_folded(layer, x), layer)
    return out


def _folded(layer: ConvNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Geometry]:
    weight, geometry = layer.conv.weight, Geometry.of(layer.conv)
    folding = Folding.of(x, weight.shape[2], geometry)
    if folding is not None:
        x, weight, geometry = folding.images(x), folding.weight(weight), Geometry(1, 0)
    return x, weight, layer.norm.weight, layer.norm.bias, geometry


class _ConvNorm(torch.autograd.Function):
    """Keeps input and output of the convolution, and the output where a sum went into ReLU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, geometry: Geometry, other: Tensor | None,
        layer: ConvNorm, activation: str,
    ) -> Tensor:  # fmt: skip
        low = weight.to(x.dtype, memory_format=CL)
        z = convolve(x, low, None, geometry)
        norm = normalise(*moments(z), layer.norm)
        y = apply(z, norm.scale, norm.shift, activation, other)
        ctx.save_for_backward(x, low, z, *norm, None if other is None else y)
        ctx.geometry, ctx.activation = geometry, activation
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, low, z, *of_norm, y = ctx.saved_tensors
        norm, activation = Norm(*of_norm), ctx.activation if y is None else "none"
        sums, g = gradient_sums(g.contiguous(memory_format=CL), z, norm, activation, y)
        grad_gamma, grad_beta, pqr = denormalise(sums, count_of(z), norm)
        gz = gradient(g, z, norm, pqr, activation)
        gx, gw, _ = convolution_gradients(gz, x, low, ctx.geometry, ctx.needs_input_grad[0])
        return gx, gw, grad_gamma, grad_beta, None, None if y is None else g, None, None


class _ConvNormPool(torch.autograd.Function):
    """Keeps input and output of the convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, geometry: Geometry, layer: ConvNorm
    ) -> Tensor:
        low = weight.to(x.dtype, memory_format=CL)
        z = convolve(x, low, None, geometry)
        norm = normalise(*moments(z), layer.norm)
        n, c, h, w = z.shape
        y = torch.empty((n, c, h // 2, w // 2), dtype=z.dtype, memory_format=CL)
        normalisation.pool(z.element_size()).launch(n, h, w, c, z, torch.stack([norm.scale, norm.shift]), y)
        ctx.save_for_backward(x, low, z, *norm)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, low, z, *of_norm = ctx.saved_tensors
        norm, g = Norm(*of_norm), g.contiguous(memory_format=CL)
        n, c, h, w = z.shape
        sums, gz, size = torch.empty(n, 2, c), torch.empty_like(z), z.element_size()
        factors = torch.stack([norm.scale, norm.shift, norm.mean])
        normalisation.pool_sums(size).launch(n, h, w, c, g, z, factors, sums)
        grad_gamma, grad_beta, pqr = denormalise(sums, count_of(z), norm)
        factors = torch.cat([factors[:2], pqr])
        normalisation.pool_gradient(size).launch(n, h, w, c, g, z, factors, gz)
        gx, gw, _ = convolution_gradients(gz, x, low, ctx.geometry, ctx.needs_input_grad[0])
        return gx, gw, grad_gamma, grad_beta, None, None


def _excitations(layer: SqueezeExcitation, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return means (N, C) and the factors of squeeze-and-excitation, joined by a small graph of their own."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        mean = mean.detach().requires_grad_()
        reduce, expand = layer.reduce, layer.expand
        hidden = layer.activation(F.linear(mean, reduce.weight.flatten(1), reduce.bias))
        return mean, F.linear(hidden, expand.weight.flatten(1), expand.bias).sigmoid()


def excited_residual(layer: ConvNorm, excite: SqueezeExcitation, x: Tensor, other: Tensor) -> Tensor:
    """Convolution, BatchNorm, squeeze-and-excitation, sum with `other`, ReLU."""
    out: Tensor = _ExcitedResidual.apply(*_folded(layer, x), other, layer, excite, *excite.parameters())
    return out


class _ExcitedResidual(torch.autograd.Function):
    """Scales and shifts differ from image to image; the means that they depend on are those of the statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, geometry: Geometry, other: Tensor,
        layer: ConvNorm, excite: SqueezeExcitation, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        low = weight.to(x.dtype, memory_format=CL)
        z = convolve(x, low, None, geometry)
        parts, pixels = moments(z)
        norm = normalise(parts, pixels, layer.norm)
        mean, s = _excitations(excite, parts[:, 0] * norm.scale + norm.shift)
        y = apply(z, norm.scale * s.detach(), norm.shift * s.detach(), "relu", other)
        ctx.save_for_backward(x, low, z, *norm, parts, y)
        ctx.geometry, ctx.graph, ctx.parameters = geometry, (mean, s), list(excite.parameters())
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, low, z, *of_norm, parts, y = ctx.saved_tensors
        norm, (mean, s), pixels = Norm(*of_norm), ctx.graph, z.shape[2] * z.shape[3]
        sums, g = gradient_sums(g.contiguous(memory_format=CL), z, norm, "none", y)
        d, dz = sums.unbind(1)  # sums of the gradient d, and of d * (z - mean)
        grad_s = norm.scale * (dz + norm.mean * d) + norm.shift * d
        grad_mean, *grads = torch.autograd.grad(s, [mean, *ctx.parameters], grad_s)
        s = s.detach()
        sums = torch.stack([s * d + grad_mean, s * dz + grad_mean * (parts[:, 0] - norm.mean)], 1)
        grad_gamma, grad_beta, (p, q, r) = denormalise(sums, count_of(z), norm)
        pqr = torch.stack([p * s, q + p * grad_mean / pixels, r.expand_as(s)], 1)
        gz = gradient(g, z, norm, pqr)
        gx, gw, _ = convolution_gradients(gz, x, low, ctx.geometry, ctx.needs_input_grad[0])
        return gx, gw, grad_gamma, grad_beta, None, g, None, None, *grads


class Bottleneck(NamedTuple):
    """The layers of an inverted bottleneck. The first may stand before the block, if that expands nothing."""

    first: ConvNorm
    deep: ConvNorm
    excite: SqueezeExcitation
    last: ConvNorm
    block: MBConv


def inverted_bottleneck(layers: Bottleneck, x: Tensor) -> Tensor:
    """Convolution, depthwise convolution, squeeze-and-excitation, 1x1 convolution, and perhaps the sum with x."""
    block, keep = layers.block, None
    if block.residual and block.drop.rate and block.training:
        keep = torch.rand(len(x), 1, 1, 1) >= block.drop.rate  # as `StochasticDepth` draws it
        keep |= ~keep.any()
        keep = keep.view(-1, 1).float() / (1 - block.drop.rate)
    *of_first, geometry = _folded(layers.first, x)
    of_deep, of_last = ([layer.conv.weight, layer.norm.weight, layer.norm.bias] for layer in (layers.deep, layers.last))
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _InvertedBottleneck.apply(
            *of_first, *of_deep, *of_last, layers, geometry, keep, *layers.excite.parameters()
        )
    return out


def chunks(images: int, bytes_each: int) -> Iterator[slice]:
    """Slices of images whose tensors fit the cache; they do not depend on the number of threads."""
    step = max(1, CHUNK // bytes_each)
    return (slice(start, min(start + step, images)) for start in range(0, images, step))


def bands_of(pixels: int) -> int:
    """Items of an image: a chunk of one image is work for several threads, too."""
    return 4 if pixels % 4 == 0 and pixels >= 256 else 1


def _rows(x: Tensor) -> Tensor:
    """Pixels as rows of a matrix: (N, C, H, W) in channels_last memory to (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _InvertedBottleneck(torch.autograd.Function):
    """Of wide tensors only the outputs of the first two convolutions, and one gradient, pass through memory.

    Work goes through the images in chunks that fit the cache. The backward pass goes through them three times, since
    the gradients of BatchNorm and of squeeze-and-excitation need sums over all that is behind them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, gamma1: Tensor, beta1: Tensor, wd: Tensor, gamma2: Tensor, beta2: Tensor,
        w3: Tensor, gamma3: Tensor, beta3: Tensor, layers: Bottleneck, geometry: Geometry, keep: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        size, kernel, stride = x.element_size(), wd.shape[2], layers.deep.conv.stride[0]
        low1, low3 = w1.to(x.dtype, memory_format=CL), w3.flatten(1).to(x.dtype)
        pointwise = w1.shape[2] == 1 and geometry == Geometry(1, 0)
        c, out = len(w1), len(w3)
        if pointwise:
            n, _, h, w = x.shape
            z1 = torch.empty((n, c, h, w), dtype=x.dtype, memory_format=CL)
            weight, bands = low1.flatten(1).t(), bands_of(h * w)
            parts = torch.empty(n * bands, 2, c)
            for part in chunks(n, size * h * w * c):
                torch.mm(_rows(x[part]), weight, out=_rows(z1[part]))
                normalisation.moments(size).launch(
                    (part.stop - part.start) * bands, h * w // bands, c, z1[part], parts[part.start * bands :]
                )
            norm1 = normalise(parts, h * w // bands, layers.first.norm)
        else:
            z1 = convolve(x, low1, None, geometry)
            n, _, h, w = z1.shape
            norm1 = normalise(*moments(z1), layers.first.norm)

        down, across = ((side - 1) // stride + 1 for side in (h, w))
        pixels = down * across
        z2 = torch.empty((n, c, down, across), dtype=x.dtype, memory_format=CL)
        parts, taps = torch.empty(n, 2, c), wd.view(c, -1).t().contiguous()
        depthwise.forward(size, kernel, stride).launch(
            n * c // 16, h, w, c, down, across, z1, torch.stack([norm1.scale, norm1.shift]), taps, z2, parts,
            scratch=depthwise.forward_scratch(kernel, h, w),
        )  # fmt: skip
        norm2 = normalise(parts, pixels, layers.deep.norm)
        factors, mean = torch.stack([norm2.scale, norm2.shift]), torch.empty(n, c)
        excitation.means(size).launch(n, pixels, c, z2, factors, mean)
        mean, s = _excitations(layers.excite, mean)

        z3 = torch.empty((n, out, down, across), dtype=x.dtype, memory_format=CL)
        bands, low3t, factor = bands_of(pixels), low3.t(), s.detach().contiguous()
        for part in chunks(n, size * pixels * c):
            excited = torch.empty_like(z2[part])
            excitation.excite(size).launch(
                len(excited) * bands, bands, pixels // bands, c, z2[part], factors, factor[part], 4 * c, excited
            )
            torch.mm(_rows(excited), low3t, out=_rows(z3[part]))
        norm3 = normalise(*moments(z3), layers.last.norm)
        by = norm3.scale if keep is None else norm3.scale * keep
        y = apply(
            z3, by, norm3.shift if keep is None else norm3.shift * keep, "none", x if layers.block.residual else None
        )
        ctx.save_for_backward(x, low1, low3, taps, z1, z2, z3, *norm1, *norm2, *norm3, keep)
        ctx.graph, ctx.parameters = (mean, s), list(layers.excite.parameters())
        ctx.geometry, ctx.stride, ctx.residual = geometry, stride, layers.block.residual
        ctx.pointwise = pointwise
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, low1, low3, taps, z1, z2, z3, *of_norms, keep = ctx.saved_tensors
        norm1, norm2, norm3 = (Norm(*of_norms[i : i + 4]) for i in (0, 4, 8))
        mean, s = ctx.graph
        g = g.contiguous(memory_format=CL)
        (n, c, h, w), (down, across), size = z1.shape, z2.shape[2:], z1.element_size()
        pixels, kernel = down * across, round(len(taps) ** 0.5)

        sums, _ = gradient_sums(g, z3, norm3, "none")
        if keep is not None:
            sums = sums * keep.repeat_interleave(len(sums) // n, 0)[:, :, None]
        grad_gamma3, grad_beta3, pqr = denormalise(sums, count_of(z3), norm3)
        if keep is not None:
            pqr = torch.stack([pqr[0] * keep, *(row.expand(n, -1) for row in pqr[1:])], 1)
        g3 = gradient(g, z3, norm3, pqr)

        bands, factor = bands_of(pixels), s.detach().contiguous()
        parts, grad_w3 = torch.empty(n * bands, 5, c), torch.zeros(low3.shape)
        factors = torch.stack([norm2.scale, norm2.shift, norm2.mean])
        for part in chunks(n, size * pixels * c):
            behind, excited = torch.empty_like(z2[part]), torch.empty_like(z2[part])
            torch.mm(_rows(g3[part]), low3, out=_rows(behind))
            excitation.gradient_sums(size).launch(
                len(behind) * bands, bands, pixels // bands, c, behind, z2[part], factors, factor[part], 4 * c, excited,
                parts[part.start * bands :],
            )  # fmt: skip
            grad_w3 += torch.mm(_rows(g3[part]).t(), _rows(excited))
        ga, gd, d, gdz, dz = parts.view(n, bands, 5, c).sum(1).unbind(1)  # a: activated, d: its derivative, z: z - mean
        grad_mean, *grads = torch.autograd.grad(s, [mean, *ctx.parameters], ga)
        through = grad_mean / pixels
        sums = torch.stack([factor * gd + through * d, factor * gdz + through * dz], 1)
        grad_gamma2, grad_beta2, pqr = denormalise(sums, count_of(z2), norm2)

        d1, parts, taps_parts = torch.empty_like(z1), torch.empty(n, 2, c), torch.empty(n, len(taps), c)
        per_image, factors2 = torch.stack([factor, through], 1), torch.cat([factors[:2], pqr])
        factors1 = torch.stack([norm1.scale, norm1.shift, norm1.mean])
        for part in chunks(n, size * pixels * c):
            behind = torch.empty_like(z2[part])
            torch.mm(_rows(g3[part]), low3, out=_rows(behind))
            depthwise.backward(size, kernel, ctx.stride).launch(
                len(behind) * c // 16, h, w, c, down, across, behind, z2[part], per_image[part], factors2, z1[part],
                factors1, taps, d1[part], parts[part], taps_parts[part],
                scratch=depthwise.backward_scratch(kernel, h, w),
            )  # fmt: skip
        grad_taps = taps_parts.sum(0).t().reshape(c, 1, kernel, kernel)
        grad_gamma1, grad_beta1, pqr = denormalise(parts, count_of(z1), norm1)

        if ctx.pointwise:
            gx: Tensor | None
            gx, weight, grad_w1 = torch.empty_like(x), low1.flatten(1), torch.zeros(c, x.shape[1])
            factors, bands = torch.cat([factors1[:2], pqr]), bands_of(h * w)
            for part in chunks(n, size * h * w * c):
                g1 = torch.empty_like(d1[part])
                normalisation.gradient(size, normalisation.NONE).launch(
                    len(g1) * bands, h * w // bands, c, d1[part], z1[part], factors, 0, g1
                )
                torch.mm(_rows(g1), weight, out=_rows(gx[part]))
                grad_w1 += torch.mm(_rows(g1).t(), _rows(x[part]))
            if ctx.residual:
                gx += g
            grad_first: Tensor | None = grad_w1.view(c, -1, 1, 1)
        else:
            g1 = gradient(d1, z1, norm1, pqr)
            gx, grad_first, _ = convolution_gradients(g1, x, low1, ctx.geometry, ctx.needs_input_grad[0])
        return (
            gx, grad_first, grad_gamma1, grad_beta1, grad_taps, grad_gamma2, grad_beta2,
            grad_w3[:, :, None, None], grad_gamma3, grad_beta3, None, None, None, *grads,
        )  # fmt: skip


def add_bias(z: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """In evaluation, what follows the last convolution of a residual block: relu(z + bias + other)."""
    return apply(z, torch.ones_like(bias), bias, "relu", other.contiguous(memory_format=CL))


def add_bias_and_pool(z: Tensor, bias: Tensor) -> Tensor:
    """In evaluation, what follows a convolution: the maximum over 2x2 pixels of relu(z + bias)."""
    n, c, h, w = z.shape
    y = torch.empty((n, c, h // 2, w // 2), dtype=z.dtype, memory_format=CL)
    normalisation.pool(z.element_size()).launch(n, h, w, c, z, torch.stack([torch.ones_like(bias), bias]), y)
    return y


def stem_weight(weight: Tensor) -> Tensor:
    """Weights (C, in, k, k) as `stem` takes them: (C / 16, k * k * in, 16) float32."""
    c, channels, k, _ = weight.shape
    return (
        weight.detach().view(c // 16, 16, channels, k, k).permute(0, 3, 4, 2, 1).reshape(c // 16, -1, 16).contiguous()
    )


def stem(x: Tensor, weight: Tensor, bias: Tensor, kernel: int, geometry: Geometry) -> Tensor:
    """In evaluation, a first layer: the maximum over 2x2 pixels of relu(convolution + bias); see `stem_weight`."""
    x = x.contiguous(memory_format=CL)
    n, channels, h, w = x.shape
    stride, padding, _ = geometry
    sides = [((side + 2 * padding - kernel) // stride + 1) // 2 for side in (h, w)]
    y = torch.empty((n, len(bias), *sides), dtype=x.dtype, memory_format=CL)
    stems.convolve_and_pool(x.element_size(), channels, kernel, stride, padding).launch(
        n, h, w, len(bias), *sides, x, weight, bias.detach().contiguous(), y,
        scratch=stems.scratch_bytes(channels, padding, h, w),
    )  # fmt: skip
    return y
