"""Depthwise convolution between two BatchNorms with SiLU, in a cache of its own for each image and 16 channels.

The map of 16 channels is unpacked to float32 in scratch memory, with a border of zeros; there it is normalised and
activated, convolved, and its output's statistics are taken. So each tensor passes through memory once.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from models.kernels.launch import kernel
from models.kernels.vectors import (
    address,
    arguments,
    emit_load,
    emit_store,
    floats,
    fma,
    fused,
    literals,
    load,
    one,
    scratch,
    sigmoid,
    splat,
    store,
    take,
    vector,
    zero,
)  # fmt: skip

VECTOR = 64  # bytes of 16 float32
SUMS = 28 if binding.get_host_cpu_features().get("avx512f") else 6  # vectors of sums that fit the registers


def _at(b, place, offset):
    return b.add(place, ir.Constant(place.type, offset))


@intrinsic(prefer_literal=True)
def windows(context, kernel_size, stride, count, place, pitch, weights, step):
    """Weighted sums over `count` neighbouring windows: a tuple of vectors.

    place: address of the first window, in rows of `pitch` bytes; weights: (kernel, kernel) vectors, `step` bytes apart.
    """
    if (known := literals(kernel_size, stride, count)) is None:
        return None
    k, jump, n = known
    result = types.UniTuple(vector, n)

    def emit(c, b, case, values):
        row, pitch, weight, step = values[3:]
        sums = [floats(0)] * n
        for _ in range(k):
            for j in range(k):
                w = emit_load(b, 4, weight)
                for o in range(n):
                    sums[o] = fused(b, emit_load(b, 4, _at(b, row, VECTOR * (o * jump + j))), w, sums[o])
                weight = b.add(weight, step)
            row = b.add(row, pitch)
        return c.make_tuple(b, result, sums)

    return result(kernel_size, stride, count, *[address] * 4), emit


@intrinsic(prefer_literal=True)
def scale_by_input_gradient(context, kernel_size, stride, count, g, pitch, weights, step, out, out_pitch):
    """Multiply stride x (count * stride) vectors at `out` by the gradient of a convolution's input there.

    g: address of the gradient of the output that belongs to the first of these pixels.
    """
    if (known := literals(kernel_size, stride, count)) is None:
        return None
    k, s, n = known

    def emit(c, b, case, values):
        g, pitch, weights, step, out, out_pitch = values[3:]
        rows = {}
        for down in range(s):
            for right in range(s):
                sums = [floats(0)] * n
                for i in range(k):
                    row, rest = divmod(down + k // 2 - i, s)  # output o pairs with input o * s + i - k // 2
                    if rest:
                        continue
                    if row not in rows:
                        rows[row] = b.add(g, b.mul(pitch, ir.Constant(pitch.type, row)))
                    for j in range(k):
                        column, rest = divmod(right + k // 2 - j, s)
                        if rest:
                            continue
                        w = emit_load(b, 4, b.add(weights, b.mul(step, ir.Constant(step.type, i * k + j))))
                        for o in range(n):
                            x = emit_load(b, 4, _at(b, rows[row], VECTOR * (o + column)))
                            sums[o] = fused(b, x, w, sums[o])
                line = b.add(out, b.mul(out_pitch, ir.Constant(out_pitch.type, down)))
                for o in range(n):
                    place = _at(b, line, VECTOR * (o * s + right))
                    emit_store(b, 4, place, b.fmul(emit_load(b, 4, place), sums[o]))
        return c.get_dummy_value()

    return types.void(kernel_size, stride, count, *[address] * 6), emit


@intrinsic(prefer_literal=True)
def weight_gradient(context, kernel_size, stride, g, g_pitch, x, x_pitch, rows, columns, out, step):
    """Write the gradient of the weights: sums of products of gradients g and windows of x, as many as fit registers."""
    if (known := literals(kernel_size, stride)) is None:
        return None
    k, s = known

    def emit(c, b, case, values):
        g, g_pitch, x, x_pitch, rows, columns, out, step = values[2:]
        for first in range(0, k, max(1, SUMS // k)):
            kernel_rows = range(first, min(k, first + max(1, SUMS // k)))
            sums = {(i, j): cgutils.alloca_once_value(b, floats(0)) for i in kernel_rows for j in range(k)}
            for cell in sums.values():
                b.store(floats(0), cell)
            with cgutils.for_range(b, rows) as row:
                g_row = b.add(g, b.mul(row.index, g_pitch))
                x_row = b.add(x, b.mul(row.index, b.mul(x_pitch, ir.Constant(x_pitch.type, s))))
                x_row = b.add(x_row, b.mul(x_pitch, ir.Constant(x_pitch.type, first)))
                with cgutils.for_range(b, columns) as column:
                    gradient = emit_load(b, 4, b.add(g_row, b.mul(column.index, ir.Constant(g.type, VECTOR))))
                    window = b.add(x_row, b.mul(column.index, ir.Constant(g.type, VECTOR * s)))
                    for i in kernel_rows:
                        for j in range(k):
                            total = b.load(sums[i, j])
                            value = emit_load(b, 4, _at(b, window, VECTOR * j))
                            b.store(fused(b, gradient, value, total), sums[i, j])
                        window = b.add(window, x_pitch)
            for (i, j), cell in sums.items():
                emit_store(b, 4, b.add(out, b.mul(step, ir.Constant(step.type, i * k + j))), b.load(cell))
        return c.get_dummy_value()

    return types.void(kernel_size, stride, *[address] * 8), emit


def forward_scratch(kernel_size: int, height: int, width: int) -> int:
    """Bytes of scratch memory of `forward`."""
    return VECTOR * (height + kernel_size) * (width + kernel_size)


@kernel
def forward(size, kernel_size, stride):
    """z2 = depthwise convolution of silu(scale * z1 + shift), and the `moments` of z2. An item: an image's 16 channels.

    factors: scale, shift; weights: (kernel * kernel, c) float32; out: (images, 2, c) float32.
    """
    pad = kernel_size // 2

    def run(block):
        height, width, c, out_height, out_width, z1, factors, weights, z2, out = arguments(block, 10)
        padded = scratch(block)
        pitch = VECTOR * (width + 2 * pad)
        for i in range((height + 2 * pad) * (width + 2 * pad)):
            store(4, padded + VECTOR * i, zero())
        inverse = splat(1 / (out_height * out_width))
        item = take(block)
        while item >= 0:
            n = item // (c // 16)
            k = 16 * (item % (c // 16))
            scale = load(4, factors + 4 * k)
            shift = load(4, factors + 4 * (c + k))
            source = z1 + size * (n * height * width * c + k)
            for h in range(height):
                place = padded + (h + pad) * pitch + VECTOR * pad
                for _ in range(width):
                    u = fma(load(size, source), scale, shift)
                    store(4, place, u * sigmoid(size, u))
                    source += size * c
                    place += VECTOR
            at = weights + 4 * k
            base = windows(kernel_size, stride, 1, padded, pitch, at, 4 * c)[0]
            a = zero()
            b = zero()
            target = z2 + size * (n * out_height * out_width * c + k)
            for h in range(out_height):
                place = padded + h * stride * pitch
                for _ in range(out_width // 4):
                    t = windows(kernel_size, stride, 4, place, pitch, at, 4 * c)
                    store(size, target, t[0])
                    store(size, target + size * c, t[1])
                    store(size, target + 2 * size * c, t[2])
                    store(size, target + 3 * size * c, t[3])
                    t0 = t[0] - base
                    t1 = t[1] - base
                    t2 = t[2] - base
                    t3 = t[3] - base
                    a = a + ((t0 + t1) + (t2 + t3))
                    b = fma(t0, t0, fma(t1, t1, fma(t2, t2, fma(t3, t3, b))))
                    target += 4 * size * c
                    place += 4 * VECTOR * stride
                for _ in range(out_width % 4):
                    value = windows(kernel_size, stride, 1, place, pitch, at, 4 * c)[0]
                    store(size, target, value)
                    t0 = value - base
                    a = a + t0
                    b = fma(t0, t0, b)
                    target += size * c
                    place += VECTOR * stride
            mean = a * inverse
            store(4, out + 8 * n * c + 4 * k, base + mean)
            store(4, out + 8 * n * c + 4 * (c + k), fma(zero() - a, mean, b))
            item = take(block)

    return run


def backward_scratch(kernel_size: int, height: int, width: int) -> int:
    """Bytes of scratch memory of `backward`."""
    return VECTOR * 3 * (height + kernel_size + 1) * (width + kernel_size + 1)


@kernel
def backward(size, kernel_size, stride):
    """From the gradient g of silu(bn2(z2)) * s to d1, that of bn1(z1), with its sums, and the gradient of the weights.

    An item: an image's 16 channels. per_image: (images, 2, c) float32, the scales s of squeeze-and-excitation, and the
    gradient of each pixel by way of the mean. factors1: scale, shift, mean; factors2: scale, shift, p, q, r, as for
    `normalisation.gradient`. out: (images, 2, c), sums of d1 and d1 * (z1 - mean); weights_out:
    (images, kernel * kernel, c).
    """
    pad = kernel_size // 2
    border = (pad + stride - 1) // stride  # around the gradient of z2

    def run(block):
        (
            height, width, c, out_height, out_width, g, z2, per_image, factors2, z1, factors1, weights, d1, out,
            weights_out,
        ) = arguments(block, 15)  # fmt: skip
        activated = scratch(block)  # silu(bn1(z1)), with a border of zeros
        pitch = VECTOR * (width + 2 * pad)
        inner = activated + (height + 2 * pad) * pitch  # the gradient of z2, likewise
        inner_pitch = VECTOR * (out_width + 2 * border)
        slopes = inner + (out_height + 2 * border) * inner_pitch  # silu'(bn1(z1)), and then d1
        slopes_pitch = VECTOR * out_width * stride
        for i in range((slopes - activated) // VECTOR):
            store(4, activated + VECTOR * i, zero())
        item = take(block)
        while item >= 0:
            n = item // (c // 16)
            k = 16 * (item % (c // 16))
            scale = load(4, factors1 + 4 * k)
            shift = load(4, factors1 + 4 * (c + k))
            mean = load(4, factors1 + 4 * (2 * c + k))
            first = n * height * width * c + k
            source = z1 + size * first
            for h in range(height):
                place = activated + (h + pad) * pitch + VECTOR * pad
                slope = slopes + h * slopes_pitch
                for _ in range(width):
                    u = fma(load(size, source), scale, shift)
                    y = sigmoid(size, u)
                    a = u * y
                    store(4, place, a)
                    store(4, slope, fma(y, one() - a, a))  # y * (1 + u * (1 - y))
                    source += size * c
                    place += VECTOR
                    slope += VECTOR
            at = factors2 + 4 * k
            scale = load(4, at)
            shift = load(4, at + 4 * c)
            factor = load(4, per_image + 8 * n * c + 4 * k)
            plus = load(4, per_image + 8 * n * c + 4 * (c + k))
            p = load(4, at + 8 * c)
            q = load(4, at + 12 * c)
            r = zero() - load(4, at + 16 * c)
            i = size * (n * out_height * out_width * c + k)
            for h in range(out_height):
                place = inner + (h + border) * inner_pitch + VECTOR * border
                for _ in range(out_width):
                    v = load(size, z2 + i)
                    u = fma(v, scale, shift)
                    y = sigmoid(size, u)
                    a = u * y
                    d = fma(load(size, g + i), factor, plus) * fma(y, one() - a, a)
                    store(4, place, fma(d, p, fma(v, r, q)))
                    i += size * c
                    place += VECTOR
            start = inner + border * inner_pitch + VECTOR * border
            weight_gradient(
                kernel_size, stride, start, inner_pitch, activated, pitch, out_height, out_width,
                weights_out + 4 * (kernel_size * kernel_size * n * c + k), 4 * c,
            )  # fmt: skip
            for h in range(out_height):
                place = start + h * inner_pitch
                slope = slopes + h * stride * slopes_pitch
                if stride == 1:
                    for _ in range(out_width // 4):
                        scale_by_input_gradient(
                            kernel_size, stride, 4, place, inner_pitch, weights + 4 * k, 4 * c, slope, slopes_pitch
                        )
                        place += 4 * VECTOR
                        slope += 4 * VECTOR
                for _ in range(out_width % 4 if stride == 1 else out_width):
                    scale_by_input_gradient(
                        kernel_size, stride, 1, place, inner_pitch, weights + 4 * k, 4 * c, slope, slopes_pitch
                    )
                    place += VECTOR
                    slope += VECTOR * stride
            a = zero()
            b = zero()
            i = size * first
            for h in range(height):
                slope = slopes + h * slopes_pitch
                for _ in range(width):
                    d = load(4, slope)
                    a = a + d
                    b = fma(d, load(size, z1 + i) - mean, b)
                    store(size, d1 + i, d)
                    i += size * c
                    slope += VECTOR
            store(4, out + 8 * n * c + 4 * k, a)
            store(4, out + 8 * n * c + 4 * (c + k), b)
            item = take(block)

    return run
