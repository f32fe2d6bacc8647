"""Squeeze-and-excitation after BatchNorm and SiLU: a = silu(scale * z + shift), then a * s with s of image and channel.

`bands` is the number of items an image is divided into; `pixels` are those of a band.
"""

from models.kernels.launch import kernel
from models.kernels.normalisation import BLOCK
from models.kernels.vectors import arguments, fma, load, one, sigmoid, splat, store, take, zero


@kernel
def means(size):
    """Mean of a over each image: out (images, c) float32."""

    def run(block):
        pixels, c, z, factors, out = arguments(block, 5)
        inverse = splat(1 / pixels)
        rows = max(4, BLOCK // size // c)
        n = take(block)
        while n >= 0:
            total = out + 4 * n * c
            for start in range(0, pixels, rows):
                for k in range(0, c, 16):
                    scale = load(4, factors + 4 * k)
                    shift = load(4, factors + 4 * (c + k))
                    place = z + size * ((n * pixels + start) * c + k)
                    a = zero()
                    for _ in range(min(rows, pixels - start)):
                        u = fma(load(size, place), scale, shift)
                        a = fma(u, sigmoid(size, u), a)
                        place += size * c
                    a = a * inverse
                    if start:
                        a = a + load(4, total + 4 * k)
                    store(4, total + 4 * k, a)
            n = take(block)

    return run


@kernel
def excite(size):
    """Multiply: a * s; s: (images, c) float32, `step` bytes from one image to the next."""

    def run(block):
        bands, pixels, c, z, factors, s, step, out = arguments(block, 8)
        n = take(block)
        while n >= 0:
            i = size * n * pixels * c
            for _ in range(pixels):
                at = factors
                by = s + n // bands * step
                for _ in range(c // 16):
                    u = fma(load(size, z + i), load(4, at), load(4, at + 4 * c))
                    store(size, out + i, u * sigmoid(size, u) * load(4, by))
                    i += 16 * size
                    at += 64
                    by += 64
            n = take(block)

    return run


@kernel
def gradient_sums(size):
    """For each band the sums of g a, g a', a', g a' (z - mean), a' (z - mean): out (images * bands, 5, c) float32.

    From them follow, before s is known to the gradient, those of s and of BatchNorm. Writes a * s again, which the
    gradient of the next convolution's weights needs. factors: scale, shift, mean.
    """

    def run(block):
        bands, pixels, c, g, z, factors, s, step, excited, out = arguments(block, 10)
        rows = max(4, BLOCK // 3 // size // c)
        n = take(block)
        while n >= 0:
            total = out + 20 * n * c
            for start in range(0, pixels, rows):
                for k in range(0, c, 16):
                    scale = load(4, factors + 4 * k)
                    shift = load(4, factors + 4 * (c + k))
                    mean = load(4, factors + 4 * (2 * c + k))
                    by = load(4, s + n // bands * step + 4 * k)
                    at = total + 4 * k
                    s0 = zero()
                    s1 = zero()
                    s2 = zero()
                    s3 = zero()
                    s4 = zero()
                    if start:
                        s0 = load(4, at)
                        s1 = load(4, at + 4 * c)
                        s2 = load(4, at + 8 * c)
                        s3 = load(4, at + 12 * c)
                        s4 = load(4, at + 16 * c)
                    i = size * ((n * pixels + start) * c + k)
                    for _ in range(min(rows, pixels - start)):
                        v = load(size, z + i)
                        d = load(size, g + i)
                        u = fma(v, scale, shift)
                        y = sigmoid(size, u)
                        a = u * y
                        store(size, excited + i, a * by)
                        x = fma(y, one() - a, a)
                        v = v - mean
                        s0 = fma(d, a, s0)
                        d = d * x
                        s1 = s1 + d
                        s2 = s2 + x
                        s3 = fma(d, v, s3)
                        s4 = fma(x, v, s4)
                        i += size * c
                    store(4, at, s0)
                    store(4, at + 4 * c, s1)
                    store(4, at + 8 * c, s2)
                    store(4, at + 12 * c, s3)
                    store(4, at + 16 * c, s4)
            n = take(block)

    return run
