"""Lanes: the product of two rows of a matrix with a narrow panel, its sums held in registers from first to last.

Written in LLVM's instructions, because numba's loops would carry the sums to the cache and back at every few
steps. Each entry is a chain of multiply-adds in the order of k, from zero, each of them one operation where the
processor has such.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 8  # float32 that are worked on as one
ABREAST = 4  # of those, in a panel's row: with two rows as many sums as keep two units busy
PANEL = LANES * ABREAST  # columns of a panel

unpack: Any = cgutils.unpack_tuple
declare: Any = cgutils.get_or_insert_function
FLOAT, WORD = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
UNDEFINED, ZERO = ir.Constant(VECTOR, ir.Undefined), ir.Constant(VECTOR, [0.0] * LANES)
FIRST_LANE = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)


def _pair(typing: Any, B: Any, upper: Any, lower: Any, panel: Any, out: Any) -> Any:
    """Rows `upper` and `lower` of B (rows, r) times a panel (r, PANEL), into the first two rows of `out` (…, PANEL)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 3, 4)]
        left, right, result = (array.data for array in arrays)
        rank = unpack(builder, arrays[0].shape, 2)[1]
        rows = [builder.gep(left, [builder.mul(arguments[at], rank)]) for at in (1, 2)]
        before, turn, after = builder.block, builder.append_basic_block("turn"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", WORD(0), rank), turn, after)
        builder.position_at_end(turn)
        k = builder.phi(WORD)
        sums = [builder.phi(VECTOR) for _ in range(2 * ABREAST)]
        some = [_at(builder, right, k, number) for number in range(ABREAST)]
        loaded = [builder.load(place, align=4) for place in some]
        factors = [_spread(builder, builder.load(builder.gep(row, [k]))) for row in rows]
        fused = declare(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32")
        pairs = [(factor, values) for factor in factors for values in loaded]
        larger = [builder.call(fused, [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]
        following = builder.add(k, WORD(1))
        k.add_incoming(WORD(0), before)
        k.add_incoming(following, turn)
        builder.cbranch(builder.icmp_signed("<", following, rank), turn, after)
        builder.position_at_end(after)
        totals = [builder.phi(VECTOR) for _ in sums]
        for total, old, new in zip(totals, sums, larger, strict=True):
            old.add_incoming(ZERO, before)
            old.add_incoming(new, turn)
            total.add_incoming(ZERO, before)
            total.add_incoming(new, turn)
        for number, total in enumerate(totals):
            builder.store(total, _at(builder, result, WORD(number // ABREAST), number % ABREAST), align=4)
        return context.get_dummy_value()

    return types.none(B, types.int64, types.int64, panel, out), generate


def _at(builder: Any, data: Any, row: Any, number: int) -> Any:
    """Where a panel's row holds its lanes of that number."""
    place = builder.add(builder.mul(row, WORD(PANEL)), WORD(LANES * number))
    return builder.bitcast(builder.gep(data, [place]), VECTOR.as_pointer())


def _spread(builder: Any, value: Any) -> Any:
    """A number in every lane."""
    return builder.shuffle_vector(builder.insert_element(UNDEFINED, value, ir.IntType(32)(0)), UNDEFINED, FIRST_LANE)


def _pointer(typing: Any, address: Any) -> Any:
    """An address as numba's `carray` takes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pair: Any = intrinsic(_pair)
pointer: Any = intrinsic(_pointer)
