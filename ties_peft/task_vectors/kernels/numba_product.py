"""Multiply rows of a matrix with a narrow panel, and compare a row of the product with a bracket, in vector registers.

Written in LLVM's instructions. In a product numba's loops store the sums and load them again every few steps: they reach
36 GFLOP/s on one core where this reaches 80, and a 4096 × 4096 module with eight adapters of rank 16 would take 0.06 s
of 0.3 s longer. For a comparison they go through the row several times: counting the entries of that module takes 0.7
times as long with `compare` as with numba's loops.

Each entry is a chain of multiply-adds in the order of k, from zero, each of them one operation where the processor has
such.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

WIDTH = 8  # float32 numbers in a vector register
VECTORS = 4  # of those in a panel's row: with two rows as many sums as keep two units busy
PANEL = WIDTH * VECTORS  # columns of a panel

unpack: Any = cgutils.unpack_tuple
uniform_tuple: Any = types.UniTuple
declare: Any = cgutils.get_or_insert_function
FLOAT, WORD = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, WIDTH)
ZERO = ir.Constant(VECTOR, [0.0] * WIDTH)
ROW, MASK = ir.VectorType(FLOAT, PANEL), ir.IntType(PANEL)  # of a panel; one bit for each of its columns


def _multiply_two_rows(typing: Any, B: Any, upper: Any, lower: Any, panel: Any, out: Any) -> Any:
    """Write rows `upper` and `lower` of B (rows, r) times a panel (r, PANEL) into `out[:2]` (…, PANEL)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 3, 4)]
        left, right, result = (array.data for array in arrays)
        rank = unpack(builder, arrays[0].shape, 2)[1]
        rows = [builder.gep(left, [builder.mul(arguments[at], rank)]) for at in (1, 2)]
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", WORD(0), rank), loop, after)
        builder.position_at_end(loop)
        k = builder.phi(WORD)
        sums = [builder.phi(VECTOR) for _ in range(2 * VECTORS)]
        addresses = [_vector_at(builder, right, k, number) for number in range(VECTORS)]
        loaded = [builder.load(address, align=4) for address in addresses]
        factors = [_spread(builder, builder.load(builder.gep(row, [k]))) for row in rows]
        multiply_add = declare(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fmuladd.v{WIDTH}f32")
        pairs = [(factor, values) for factor in factors for values in loaded]
        larger = [builder.call(multiply_add, [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]
        following = builder.add(k, WORD(1))
        k.add_incoming(WORD(0), before)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, rank), loop, after)
        builder.position_at_end(after)
        totals = [builder.phi(VECTOR) for _ in sums]
        for total, old, new in zip(totals, sums, larger, strict=True):
            old.add_incoming(ZERO, before)
            old.add_incoming(new, loop)
            total.add_incoming(ZERO, before)
            total.add_incoming(new, loop)
        for number, total in enumerate(totals):
            builder.store(total, _vector_at(builder, result, WORD(number // VECTORS), number % VECTORS), align=4)
        return context.get_dummy_value()

    return types.none(B, types.int64, types.int64, panel, out), generate


def _compare(typing: Any, block: Any, row: Any, low: Any, high: Any) -> Any:
    """Return how many magnitudes in a row of a block exceed `high`, and a bit for each, set if it is in [low, high]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [builder.mul(arguments[1], WORD(PANEL))])
        values = builder.load(builder.bitcast(place, ROW.as_pointer()), align=4)
        magnitudes = builder.call(
            declare(builder.module, ir.FunctionType(ROW, [ROW]), f"llvm.fabs.v{PANEL}f32"), [values]
        )
        least, most = (_spread(builder, limit, PANEL) for limit in arguments[2:])
        above = builder.fcmp_ordered(">", magnitudes, most)
        inside = builder.and_(
            builder.fcmp_ordered(">=", magnitudes, least), builder.fcmp_ordered("<=", magnitudes, most)
        )
        bits = [builder.bitcast(marks, MASK) for marks in (above, inside)]
        number = builder.call(declare(builder.module, ir.FunctionType(MASK, [MASK]), f"llvm.ctpop.i{PANEL}"), bits[:1])
        return context.make_tuple(builder, signature.return_type, [number, bits[1]])

    return uniform_tuple(types.uint32, 2)(block, types.int64, low, high), generate


def _vector_at(builder: Any, data: Any, row: Any, number: int) -> Any:
    """Return the address of the vector of that number in a panel's row."""
    place = builder.add(builder.mul(row, WORD(PANEL)), WORD(WIDTH * number))
    return builder.bitcast(builder.gep(data, [place]), VECTOR.as_pointer())


def _spread(builder: Any, value: Any, width: int = WIDTH) -> Any:
    """Return a vector that holds a number in every place."""
    undefined = ir.Constant(ir.VectorType(FLOAT, width), ir.Undefined)
    first = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(builder.insert_element(undefined, value, ir.IntType(32)(0)), undefined, first)


def _pointer(typing: Any, address: Any) -> Any:
    """Return an address as numba's `carray` takes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


multiply_two_rows: Any = intrinsic(_multiply_two_rows)
compare: Any = intrinsic(_compare)
pointer: Any = intrinsic(_pointer)
