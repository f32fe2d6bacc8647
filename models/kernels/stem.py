"""The first layer of a network in evaluation: convolution, bias, ReLU and 2x2 max pool in one pass.

One or three input channels do not fill a vector, so here a vector holds 16 output channels, and each number of the
image meets them all. The convolution's output, the largest map of a network, never leaves the registers: only a quarter
of it, the maxima, is written.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from models.kernels.launch import kernel
from models.kernels.vectors import (
    FLOAT,
    FLOATS,
    I32,
    address,
    arguments,
    emit_load,
    fused,
    ints,
    literals,
    load,
    relu,
    scratch,
    store,
    take,
    vector,
    where_greater,
    zero,
)


def _spread(b, place):
    """Emit a float32 from memory in all lanes."""
    number = b.load(b.inttoptr(place, FLOAT.as_pointer()), align=4)
    start = b.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.Constant(I32, 0))
    return b.shuffle_vector(start, ir.Constant(FLOATS, ir.Undefined), ints(0))


@intrinsic(prefer_literal=True)
def unpack(context, size, source, target):
    """Copy a number of `size` bytes to float32."""
    if (known := literals(size)) is None:
        return None

    def emit(c, b, case, values):
        kind = FLOAT if known[0] == 4 else ir.IntType(16)
        number = b.load(b.inttoptr(values[1], kind.as_pointer()), align=known[0])
        if known[0] == 2:
            number = b.bitcast(b.shl(b.zext(number, I32), ir.Constant(I32, 16)), FLOAT)
        b.store(number, b.inttoptr(values[2], FLOAT.as_pointer()), align=4)
        return c.get_dummy_value()

    return types.void(size, address, address), emit


@intrinsic(prefer_literal=True)
def add_row(context, count, step, upper, lower, weights, a, b, c, d):
    """Add a row of `count` products to four neighbouring outputs, `step` numbers apart in the rows of the image."""
    if (known := literals(count, step)) is None:
        return None
    n, apart = known
    result = types.UniTuple(vector, 4)

    def emit(context, builder, case, values):
        upper, lower, weights, *sums = values[2:]
        for j in range(n):
            w = emit_load(builder, 4, builder.add(weights, ir.Constant(weights.type, 64 * j)))
            for i, (row, right) in enumerate(((upper, 0), (upper, 1), (lower, 0), (lower, 1))):
                x = _spread(builder, builder.add(row, ir.Constant(row.type, 4 * (j + right * apart))))
                sums[i] = fused(builder, x, w, sums[i])
        return context.make_tuple(builder, result, sums)

    return result(count, step, *[address] * 3, *[vector] * 4), emit


def scratch_bytes(channels: int, padding: int, height: int, width: int) -> int:
    """Bytes of scratch memory of `convolve_and_pool`."""
    return 4 * channels * (height + 2 * padding) * (width + 2 * padding)


@kernel
def convolve_and_pool(size, channels, kernel_size, stride, padding):
    """Maximum over 2x2 pixels of relu(convolution + bias); an item is an image.

    x: (images, height, width, channels); weights: (c / 16, kernel, kernel, channels, 16) float32; bias: (c,) float32;
    out: (images, pooled height, pooled width, c).
    """
    numbers = kernel_size * channels  # of a row of the kernel
    step = stride * channels

    def run(block):
        height, width, c, pooled_height, pooled_width, x, weights, bias, out = arguments(block, 9)
        padded = scratch(block)
        pitch = 4 * channels * (width + 2 * padding)
        for i in range(0, channels * (height + 2 * padding) * (width + 2 * padding), 16):
            store(4, padded + 4 * i, zero())  # scratch memory is whole vectors
        n = take(block)
        while n >= 0:
            source = x + size * n * height * width * channels
            for h in range(height):
                place = padded + (h + padding) * pitch + 4 * channels * padding
                for _ in range(width * channels):
                    unpack(size, source, place)
                    source += size
                    place += 4
            for k in range(0, c, 16):
                shift = load(4, bias + 4 * k)
                target = out + size * (n * pooled_height * pooled_width * c + k)
                for h in range(pooled_height):
                    upper = padded + 2 * h * stride * pitch
                    for _ in range(pooled_width):
                        row = upper
                        weight = weights + 4 * kernel_size * numbers * k
                        a = zero()
                        b = zero()
                        d = zero()
                        e = zero()
                        for _ in range(kernel_size):
                            sums = add_row(numbers, step, row, row + stride * pitch, weight, a, b, d, e)
                            a = sums[0]
                            b = sums[1]
                            d = sums[2]
                            e = sums[3]
                            row += pitch
                            weight += 64 * numbers
                        a = where_greater(b, a, b, a)
                        d = where_greater(e, d, e, d)
                        store(size, target, relu(where_greater(d, a, d, a) + shift))
                        target += size * c
                        upper += 8 * step
            n = take(block)

    return run
