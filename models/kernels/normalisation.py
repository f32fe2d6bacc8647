"""BatchNorm with what follows it: activation, sum, 2x2 max pool. Maps are (images, pixels, c), c a multiple of 16.

What BatchNorm does to a number is u = scale * z + shift, with factors of a channel; the factors may also differ from
image to image, for squeeze-and-excitation and stochastic depth. `step` is the number of bytes from the factors of an
image to those of the next: 0 if all share them.
"""

from models.kernels.launch import kernel
from models.kernels.vectors import (
    arguments,
    fma,
    load,
    one,
    relu,
    sigmoid,
    splat,
    store,
    take,
    where_greater,
    zero,
)  # fmt: skip

NONE, RELU, SILU = range(3)  # activations
BLOCK = 16_384  # bytes that are read for one group of channels after another; they fit the first cache


@kernel
def moments(size):
    """For each image and channel the mean, and the sum of squared differences from it: out (images, 2, c) float32."""

    def run(block):
        pixels, c, z, out = arguments(block, 4)
        rows = max(4, BLOCK // size // c)
        n = take(block)
        while n >= 0:
            first = z + size * n * pixels * c  # differences from the first pixel: a mean far from 0 does no harm
            total = out + 8 * n * c
            for start in range(0, pixels, rows):
                count = min(rows, pixels - start)
                for k in range(0, c, 16):
                    base = load(size, first + size * k)
                    place = first + size * (start * c + k)
                    a = zero()
                    b = zero()
                    a2 = zero()
                    b2 = zero()
                    for _ in range(count // 2):  # two sums each, which do not wait for each other
                        v = load(size, place) - base
                        w = load(size, place + size * c) - base
                        a = a + v
                        b = fma(v, v, b)
                        a2 = a2 + w
                        b2 = fma(w, w, b2)
                        place += 2 * size * c
                    if count % 2:
                        v = load(size, place) - base
                        a = a + v
                        b = fma(v, v, b)
                    a = a + a2
                    b = b + b2
                    if start:
                        a = a + load(4, total + 4 * k)
                        b = b + load(4, total + 4 * (c + k))
                    store(4, total + 4 * k, a)
                    store(4, total + 4 * (c + k), b)
            inverse = splat(1 / pixels)
            for k in range(0, c, 16):
                a = load(4, total + 4 * k)
                mean = a * inverse
                store(4, total + 4 * k, load(size, first + size * k) + mean)
                store(4, total + 4 * (c + k), fma(zero() - a, mean, load(4, total + 4 * (c + k))))
            n = take(block)

    return run


@kernel
def apply(size, activation, plus):
    """activation(scale * z + shift [+ other]); factors: scale, shift."""

    def run(block):
        pixels, c, z, factors, step, other, out = arguments(block, 7)
        n = take(block)
        while n >= 0:
            i = size * n * pixels * c
            at = factors + n * step
            for _ in range(pixels):
                for k in range(0, c, 16):
                    u = fma(load(size, z + i), load(4, at + 4 * k), load(4, at + 4 * (c + k)))
                    if plus:
                        u = u + load(size, other + i)
                    if activation == 1:
                        u = relu(u)
                    if activation == 2:
                        u = u * sigmoid(size, u)
                    store(size, out + i, u)
                    i += 16 * size
            n = take(block)

    return run


@kernel
def gradient_sums(size, activation, masked):
    """For each image and channel the sums of d and d * (z - mean); d is the gradient g before the activation.

    factors: scale, shift, mean. out: (images, 2, c) float32. If `masked`, ReLU has seen a sum and its output y tells
    where it was positive; d is written then, since the other summand needs it.
    """

    def run(block):
        pixels, c, g, z, factors, step, y, d_out, out = arguments(block, 9)
        rows = max(4, BLOCK // (2 + masked) // size // c)
        n = take(block)
        while n >= 0:
            at = factors + n * step
            total = out + 8 * n * c
            for start in range(0, pixels, rows):
                count = min(rows, pixels - start)
                for k in range(0, c, 16):
                    scale = load(4, at + 4 * k)
                    shift = load(4, at + 4 * (c + k))
                    mean = load(4, at + 4 * (2 * c + k))
                    a = zero()
                    b = zero()
                    if start:
                        a = load(4, total + 4 * k)
                        b = load(4, total + 4 * (c + k))
                    i = size * ((n * pixels + start) * c + k)
                    for _ in range(count):
                        v = load(size, z + i)
                        d = load(size, g + i)
                        if masked:
                            d = where_greater(load(size, y + i), zero(), d, zero())
                            store(size, d_out + i, d)
                        if activation == 1:
                            d = where_greater(fma(v, scale, shift), zero(), d, zero())
                        if activation == 2:
                            u = fma(v, scale, shift)
                            s = sigmoid(size, u)
                            d = d * s * fma(u, one() - s, one())
                        a = a + d
                        b = fma(d, v - mean, b)
                        i += size * c
                    store(4, total + 4 * k, a)
                    store(4, total + 4 * (c + k), b)
            n = take(block)

    return run


@kernel
def gradient(size, activation):
    """The gradient of z: p * d + q - r * z, d as in `gradient_sums`; factors: scale, shift, p, q, r."""

    def run(block):
        pixels, c, g, z, factors, step, out = arguments(block, 7)
        n = take(block)
        while n >= 0:
            i = size * n * pixels * c
            for _ in range(pixels):
                at = factors + n * step
                for _ in range(c // 16):
                    v = load(size, z + i)
                    d = load(size, g + i)
                    if activation == 1:
                        d = where_greater(fma(v, load(4, at), load(4, at + 4 * c)), zero(), d, zero())
                    if activation == 2:
                        u = fma(v, load(4, at), load(4, at + 4 * c))
                        s = sigmoid(size, u)
                        d = d * s * fma(u, one() - s, one())
                    d = fma(d, load(4, at + 8 * c), load(4, at + 12 * c))
                    store(size, out + i, fma(zero() - v, load(4, at + 16 * c), d))
                    i += 16 * size
                    at += 64
            n = take(block)

    return run


@kernel
def pool(size):
    """Maximum over 2x2 pixels of relu(scale * z + shift); a last odd row or column is left out, as torch does."""

    def run(block):
        height, width, c, z, factors, out = arguments(block, 6)
        n = take(block)
        while n >= 0:
            o = out + size * n * (height // 2) * (width // 2) * c
            for h in range(height // 2):
                upper = z + size * (n * height + 2 * h) * width * c
                for _ in range(width // 2):
                    for k in range(0, c, 16):
                        scale = load(4, factors + 4 * k)
                        shift = load(4, factors + 4 * (c + k))
                        lower = upper + size * width * c
                        a = fma(load(size, upper), scale, shift)
                        b = fma(load(size, upper + size * c), scale, shift)
                        d = fma(load(size, lower), scale, shift)
                        e = fma(load(size, lower + size * c), scale, shift)
                        a = where_greater(b, a, b, a)
                        d = where_greater(e, d, e, d)
                        store(size, o, relu(where_greater(d, a, d, a)))
                        upper += 16 * size
                        o += 16 * size
                    upper += size * c
            n = take(block)

    return run


@kernel
def pool_sums(size):
    """`gradient_sums` for `pool`: d is g at the first largest of four pixels, where that is positive."""

    def run(block):
        height, width, c, g, z, factors, out = arguments(block, 7)
        n = take(block)
        while n >= 0:
            total = out + 8 * n * c
            for h in range(height // 2):
                for k in range(0, c, 16):
                    scale = load(4, factors + 4 * k)
                    shift = load(4, factors + 4 * (c + k))
                    mean = load(4, factors + 4 * (2 * c + k))
                    a = zero()
                    b = zero()
                    if h:
                        a = load(4, total + 4 * k)
                        b = load(4, total + 4 * (c + k))
                    upper = z + size * ((n * height + 2 * h) * width * c + k)
                    o = g + size * ((n * (height // 2) + h) * (width // 2) * c + k)
                    for _ in range(width // 2):
                        lower = upper + size * width * c
                        z0 = load(size, upper)
                        z1 = load(size, upper + size * c)
                        z2 = load(size, lower)
                        z3 = load(size, lower + size * c)
                        u0 = fma(z0, scale, shift)
                        u1 = fma(z1, scale, shift)
                        u2 = fma(z2, scale, shift)
                        u3 = fma(z3, scale, shift)
                        z0 = where_greater(u1, u0, z1, z0)
                        u0 = where_greater(u1, u0, u1, u0)
                        z2 = where_greater(u3, u2, z3, z2)
                        u2 = where_greater(u3, u2, u3, u2)
                        z0 = where_greater(u2, u0, z2, z0)
                        u0 = where_greater(u2, u0, u2, u0)
                        d = where_greater(u0, zero(), load(size, o), zero())
                        a = a + d
                        b = fma(d, z0 - mean, b)
                        upper += 2 * size * c
                        o += size * c
                    store(4, total + 4 * k, a)
                    store(4, total + 4 * (c + k), b)
            n = take(block)

    return run


@kernel
def pool_gradient(size):
    """`gradient` for `pool`; a last odd row or column has d = 0."""

    def run(block):
        height, width, c, g, z, factors, out = arguments(block, 7)
        n = take(block)
        while n >= 0:
            o = g + size * n * (height // 2) * (width // 2) * c
            for h in range(height // 2):
                i = size * (n * height + 2 * h) * width * c
                for _ in range(width // 2):
                    at = factors
                    for _ in range(c // 16):
                        scale = load(4, at)
                        shift = load(4, at + 4 * c)
                        q = load(4, at + 12 * c)
                        r = zero() - load(4, at + 16 * c)
                        j = i + size * width * c
                        z0 = load(size, z + i)
                        z1 = load(size, z + i + size * c)
                        z2 = load(size, z + j)
                        z3 = load(size, z + j + size * c)
                        u0 = fma(z0, scale, shift)
                        u1 = fma(z1, scale, shift)
                        u2 = fma(z2, scale, shift)
                        u3 = fma(z3, scale, shift)
                        top = where_greater(u1, u0, u1, u0)
                        low = where_greater(u3, u2, u3, u2)
                        largest = where_greater(low, top, low, top)
                        d = where_greater(largest, zero(), load(size, o) * load(4, at + 8 * c), zero())
                        below = where_greater(low, top, d, zero())
                        above = d - below
                        d3 = where_greater(u3, u2, below, zero())
                        d1 = where_greater(u1, u0, above, zero())
                        store(size, out + i, fma(z0, r, above - d1 + q))
                        store(size, out + i + size * c, fma(z1, r, d1 + q))
                        store(size, out + j, fma(z2, r, below - d3 + q))
                        store(size, out + j + size * c, fma(z3, r, d3 + q))
                        i += 16 * size
                        o += 16 * size
                        at += 64
                    i += size * c
                if width % 2:
                    for row in range(2):
                        j = i + size * row * width * c
                        for k in range(0, c, 16):
                            value = fma(
                                zero() - load(size, z + j),
                                load(4, factors + 4 * (4 * c + k)),
                                load(4, factors + 4 * (3 * c + k)),
                            )
                            store(size, out + j, value)
                            j += 16 * size
            if height % 2:
                i = size * (n * height + height - 1) * width * c
                for _ in range(width):
                    for k in range(0, c, 16):
                        value = fma(
                            zero() - load(size, z + i),
                            load(4, factors + 4 * (4 * c + k)),
                            load(4, factors + 4 * (3 * c + k)),
                        )
                        store(size, out + i, value)
                        i += 16 * size
            n = take(block)

    return run
