"""Vectors of 16 float32 numbers for numba, and the operations on them.

A vector is an LLVM `<16 x float>`: one register with AVX-512, two with AVX2, four with NEON. So the code of a kernel
says what is computed together, and nothing depends on a compiler's success in vectorising loops. Numbers in memory are
float32 or bfloat16, whose size in bytes (4 or 2) is a constant of the kernel; arithmetic is in float32.
"""

import operator

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

LANES = 16
CONVERTS = bool(binding.get_host_cpu_features().get("avx512bf16"))  # an instruction that rounds float32 to bfloat16
FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, SHORTS, INTS = (ir.VectorType(kind, LANES) for kind in (FLOAT, I16, I32))


class Vector(types.Type):
    """The type of a vector in numba."""

    def __init__(self):
        super().__init__(name="vector16")


@register_model(Vector)
class VectorModel(PrimitiveModel):
    """Its representation in LLVM."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, FLOATS)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


vector, address = Vector(), types.int64


def floats(x):
    """Return an LLVM constant vector."""
    return ir.Constant(FLOATS, [ir.Constant(FLOAT, float(np.float32(x)))] * LANES)


def ints(x):
    """Return an LLVM constant vector of 32-bit integers."""
    return ir.Constant(INTS, [ir.Constant(I32, x)] * LANES)


def call(builder, name, result, *arguments):
    """Call a function of LLVM."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fused(b, x, y, z):
    """Emit x * y + z."""
    return call(b, "llvm.fma.v16f32", FLOATS, x, y, z)


def emit_load(b, size, place):
    """Emit the load of 16 numbers of `size` bytes."""
    if size == 4:
        return b.load(b.inttoptr(place, FLOATS.as_pointer()), align=4)
    low = b.load(b.inttoptr(place, SHORTS.as_pointer()), align=2)
    return b.bitcast(b.shl(b.zext(low, INTS), ints(16)), FLOATS)  # bfloat16 is the upper half of float32


def emit_store(b, size, place, x):
    """Emit the store of 16 numbers of `size` bytes, rounded to nearest, ties to even."""
    if size == 2 and CONVERTS:
        x = call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), LANES), x)
    elif size == 2:
        bits = b.bitcast(x, INTS)
        odd = b.and_(b.lshr(bits, ints(16)), ints(1))
        x = b.trunc(b.lshr(b.add(b.add(bits, ints(0x7FFF)), odd), ints(16)), SHORTS)
    b.store(x, b.inttoptr(place, x.type.as_pointer()), align=size)


def _powers(degree):
    """Coefficients of 2**f for f in -0.5 to 0.5, the highest first: least squares of the relative error."""
    f = np.linspace(-0.5, 0.5, 4001)
    return np.polyfit(f, np.exp2(f), degree, w=np.exp2(-f))


POWERS = {2: _powers(3), 4: _powers(6)}  # relative errors 1e-4, a twentieth of bfloat16's rounding, and 3e-8


def emit_sigmoid(b, size, x):
    """Emit 1 / (1 + exp(-x)), as exactly as numbers of `size` bytes need; NaN stays NaN."""
    t = b.fmul(x, floats(-1.4426950408889634))
    for limit, sign in ((-100, "<"), (100, ">")):  # ordered comparisons leave NaN alone
        t = b.select(b.fcmp_ordered(sign, t, floats(limit)), floats(limit), t)
    whole = b.fadd(t, floats(1.5 * 2**23))  # rounds to an integer, which is in the lowest bits
    f = b.fsub(t, b.fsub(whole, floats(1.5 * 2**23)))
    power = floats(POWERS[size][0])
    for coefficient in POWERS[size][1:]:
        power = fused(b, power, f, floats(coefficient))
    scale = b.bitcast(b.add(b.shl(b.bitcast(whole, INTS), ints(23)), ints(0x3F800000)), FLOATS)  # 2**integer
    below = fused(b, power, scale, floats(1))
    if size == 4:
        return b.fdiv(floats(1), below)
    guess = b.bitcast(b.sub(ints(0x7EF311C3), b.bitcast(below, INTS)), FLOATS)  # 12 % off; Newton's steps square that
    for _ in range(2):
        guess = b.fmul(guess, fused(b, b.fneg(below), guess, floats(2)))
    return guess


def operation(result, *arguments):
    """Make a function for kernels, with the types of result and arguments, from one that emits instructions."""

    def make(emit):
        def function(*values):
            raise TypeError(f"{emit.__name__} is called by kernels, not by Python")

        function.__name__ = function.__qualname__ = emit.__name__
        case = signature(result, *arguments)
        template = type(emit.__name__, (ConcreteTemplate,), {"key": function, "cases": [case]})
        infer_global(function, types.Function(template))
        lower_builtin(function, *arguments)(
            lambda context, b, case, values: emit(b, *values) or context.get_dummy_value()
        )
        return function

    return make


for _symbol, _emit in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _cases = {"key": _symbol, "cases": [signature(vector, vector, vector)]}
    infer_global(_symbol)(type(f"vector_{_emit}", (ConcreteTemplate,), _cases))
    lower_builtin(_symbol, vector, vector)(lambda context, b, case, values, emit=_emit: getattr(b, emit)(*values))


@operation(vector)
def zero(b):
    """Zeros."""
    return floats(0)


@operation(vector)
def one(b):
    """Ones."""
    return floats(1)


@operation(vector, types.float64)
def splat(b, x):
    """A number in all lanes."""
    start = b.insert_element(ir.Constant(FLOATS, ir.Undefined), b.fptrunc(x, FLOAT), ir.Constant(I32, 0))
    return b.shuffle_vector(start, ir.Constant(FLOATS, ir.Undefined), ints(0))


@operation(vector, vector, vector, vector)
def fma(b, x, y, z):
    """Return x * y + z, rounded once."""
    return fused(b, x, y, z)


@operation(vector, vector)
def relu(b, x):
    """NaN stays NaN."""
    return b.select(b.fcmp_ordered("<", x, floats(0)), floats(0), x)


@operation(vector, vector, vector, vector, vector)
def where_greater(b, x, y, then, otherwise):
    """`then` where x > y."""
    return b.select(b.fcmp_ordered(">", x, y), then, otherwise)


def literals(*values):
    """The numbers behind constants of a kernel; None while numba has not found out that they are constants."""
    if not all(isinstance(value, types.IntegerLiteral) for value in values):
        return None
    return [value.literal_value for value in values]


@intrinsic(prefer_literal=True)
def load(context, size, place):
    """Load 16 numbers of `size` bytes."""
    if (known := literals(size)) is None:
        return None
    return vector(size, address), lambda c, b, case, values: emit_load(b, known[0], values[1])


@intrinsic(prefer_literal=True)
def store(context, size, place, x):
    """Store 16 numbers of `size` bytes."""
    if (known := literals(size)) is None:
        return None

    def emit(c, b, case, values):
        emit_store(b, known[0], values[1], values[2])
        return c.get_dummy_value()

    return types.void(size, address, vector), emit


@intrinsic(prefer_literal=True)
def sigmoid(context, size, x):
    """1 / (1 + exp(-x)), as exactly as numbers of `size` bytes need."""
    if (known := literals(size)) is None:
        return None
    return vector(size, vector), lambda c, b, case, values: emit_sigmoid(b, known[0], values[1])


@intrinsic(prefer_literal=True)
def arguments(context, block, count):
    """Return the arguments of a launch: a tuple of `count` integers."""
    if (known := literals(count)) is None:
        return None
    result = types.UniTuple(types.int64, known[0])

    def emit(c, b, case, values):
        numbers = b.inttoptr(values[0], I64.as_pointer())
        return c.make_tuple(b, result, [b.load(_item(b, numbers, HEAD + i)) for i in range(known[0])])

    return result(address, count), emit


# a launch's block of integers: [next item, items, next scratch, first scratch, bytes of scratch, arguments...]
HEAD = 5


def _item(b, numbers, i):
    return b.gep(numbers, [ir.Constant(I64, i)])


def _count_up(b, numbers, i):
    return b.atomic_rmw("add", _item(b, numbers, i), ir.Constant(I64, 1), "monotonic")


@operation(types.int64, address)
def take(b, block):
    """The next item of a launch that no thread has taken, or -1."""
    numbers = b.inttoptr(block, I64.as_pointer())
    item = _count_up(b, numbers, 0)
    return b.select(b.icmp_signed("<", item, b.load(_item(b, numbers, 1))), item, ir.Constant(I64, -1))


@operation(address, address)
def scratch(b, block):
    """Memory for this thread alone; called once by a kernel."""
    numbers = b.inttoptr(block, I64.as_pointer())
    mine = b.mul(_count_up(b, numbers, 2), b.load(_item(b, numbers, 4)))
    return b.add(b.load(_item(b, numbers, 3)), mine)
