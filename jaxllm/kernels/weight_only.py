"""Products of bfloat16 activations with the values of codes: a Pallas kernel for TPU that makes them in fast memory.

Where codes share a byte, or scales change along a row, XLA writes what it makes of them to main memory: 5 to 19
times the bytes of the codes (`scripts/quantized_bytes.py`). Here a block of codes is read, decoded and multiplied.

Shapes: M rows, I inputs, O outputs, P bytes of codes of an output, G groups of inputs with a scale each.
"""

import dataclasses

import jax
import jax.numpy as jnp

LANES = 128
OUTPUTS = 256
INPUTS = 4096
#: Rows of one product within a kernel: more of them make it longer to compile (2048: 10 s), not faster.
ROWS = 256
#: Fast memory for a block of rows, and for all of a kernel; a v5p has 64 MiB, a v6e 128.
ROWS_BYTES, BYTES = 16 * 2**20, 56 * 2**20


@dataclasses.dataclass(frozen=True)
class Coding:
    """What a code stands for, in units of its scale: one of the levels, or itself as a signed integer."""

    bits: int
    levels: tuple[float, ...] | None = None

    @property
    def per_byte(self) -> int:
        return 8 // self.bits


def fits(x: jax.Array, codes_OP: jax.Array, groups: int, coding: Coding) -> bool:
    """Whether these are whole tiles of what the kernel knows."""
    whole = codes_OP.ndim == 2 and all(n % LANES == 0 for n in codes_OP.shape) and groups % 8 in (0, 1)
    return x.dtype == jnp.bfloat16 and whole and len(coding.levels or ()) <= LANES


def product(x_MI, codes_OP, scale_OG, zero_OG, coding: Coding, *, interpret: bool = False) -> jax.Array:
    """`x W^T`, `[M, O]`, W being the values of the codes less their zeros (or None), times their scales."""
    from jax.experimental import pallas as pl

    (M, inputs), outputs = x_MI.shape, _block(codes_OP.shape[0], OUTPUTS)
    rows, x_MI = _padded(x_MI, 2 * inputs)

    def kernel(x_ref, codes_ref, *refs):
        *columns, y_ref, w_ref, turned_ref = refs
        _decode(codes_ref, columns, w_ref, turned_ref, coding, group=inputs // columns[0].shape[0], first=0)

        def multiply(some):
            y_ref[some] = _dot(x_ref[some], w_ref[...], 1).astype(y_ref.dtype)

        _by_rows(rows, multiply)

    columns = _columns(scale_OG, zero_OG, x_MI.dtype)
    y_MO = _call(
        kernel,
        (len(x_MI) // rows, codes_OP.shape[0] // outputs),
        [
            pl.BlockSpec((rows, inputs), lambda m, o: (m, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((outputs, codes_OP.shape[1]), lambda m, o: (o, 0)),
            *[pl.BlockSpec((len(c), outputs), lambda m, o: (0, o)) for c in columns],
        ],
        pl.BlockSpec((rows, outputs), lambda m, o: (m, o)),
        (x_MI, codes_OP, *columns),
        jax.ShapeDtypeStruct((len(x_MI), codes_OP.shape[0]), x_MI.dtype),
        [((outputs, inputs), x_MI.dtype), (_turned(columns, outputs), jnp.float32)],
        interpret,
    )
    return y_MO[:M]


def product_back(dy_MO, codes_OP, scale_OG, zero_OG, coding: Coding, *, interpret: bool = False) -> jax.Array:
    """`dy W`, `[M, I]`: the gradient of `product` by its activations."""
    from jax.experimental import pallas as pl

    (M, all_outputs), per_byte = dy_MO.shape, coding.per_byte
    all_inputs = codes_OP.shape[1] * per_byte
    inputs, outputs = _block(all_inputs, INPUTS, LANES * per_byte), _block(all_outputs, OUTPUTS)
    rows, dy_MO = _padded(dy_MO, 4 * inputs)

    def kernel(dy_ref, codes_ref, *refs):
        *columns, dx_ref, w_ref, turned_ref, sum_ref = refs
        group, first = all_inputs // columns[0].shape[0], pl.program_id(1) * inputs
        begins, ends = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
        _decode(codes_ref, columns, w_ref, turned_ref, coding, group=group, first=first)

        def multiply(some):
            part = _dot(dy_ref[some], w_ref[...], 0)
            sum_ref[some] = jnp.where(begins, part, sum_ref[some] + part)

        _by_rows(rows, multiply)

        @pl.when(ends)
        def _():
            dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)

    columns = _columns(scale_OG, zero_OG, dy_MO.dtype)
    dx_MI = _call(
        kernel,
        (len(dy_MO) // rows, all_inputs // inputs, all_outputs // outputs),
        [
            pl.BlockSpec((rows, outputs), lambda m, i, o: (m, o)),
            pl.BlockSpec((outputs, inputs // per_byte), lambda m, i, o: (o, i)),
            *[pl.BlockSpec((len(c), outputs), lambda m, i, o: (0, o)) for c in columns],
        ],
        pl.BlockSpec((rows, inputs), lambda m, i, o: (m, i), pipeline_mode=pl.Buffered(1)),
        (dy_MO, codes_OP, *columns),
        jax.ShapeDtypeStruct((len(dy_MO), all_inputs), dy_MO.dtype),
        [
            ((outputs, inputs), dy_MO.dtype),
            (_turned(columns, outputs), jnp.float32),
            ((rows, inputs), jnp.float32),
        ],
        interpret,
    )
    return dx_MI[:M]


def _block(size: int, most: int, step: int = LANES) -> int:
    """The largest part of an axis that divides it, in steps."""
    return next(n for n in range(min(most, size) // step * step, 0, -step) if size % n == 0)


def _padded(x_MX, bytes_of_a_row: int):
    """`(rows, x)`: rows of a block, as few blocks as fast memory allows, and x filled up to whole blocks."""
    step = 16 if len(x_MX) <= ROWS else ROWS
    steps = -(-len(x_MX) // step)
    blocks = -(-steps * step * bytes_of_a_row // ROWS_BYTES)
    rows = -(-steps // blocks) * step
    return rows, jnp.pad(x_MX, ((0, blocks * rows - len(x_MX)), (0, 0)))


def _by_rows(rows: int, multiply) -> None:
    from jax.experimental import pallas as pl

    if rows <= ROWS:
        multiply(slice(None))
        return

    def some(n, _):
        multiply(pl.ds(pl.multiple_of(n * ROWS, ROWS), ROWS))
        return 0

    jax.lax.fori_loop(0, rows // ROWS, some, 0)


def _columns(scale_OG, zero_OG, dtype):
    """Scales, and zeros if there are any, as `[G, O]`: in main memory, rows of few numbers are padded to 128."""
    given = [x.T.astype(dtype) for x in (scale_OG, zero_OG) if x is not None]
    return [jnp.tile(x, (8, 1)) if len(x) == 1 else x for x in given]


def _turned(columns, outputs):
    return len(columns), outputs, -(-len(columns[0]) // LANES) * LANES


def _dot(a, b, axis: int):
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _decode(codes_ref, columns, w_ref, turned_ref, coding: Coding, *, group: int, first):
    """Writes the values of a block, `[O, I]`, of which the first input has this number."""
    from jax.experimental import pallas as pl

    outputs, per_byte = codes_ref.shape[0], coding.per_byte
    for n, column in enumerate(columns):
        rows = column[...].astype(jnp.float32)
        rows = jnp.pad(rows, ((0, turned_ref.shape[2] - len(rows)), (0, 0)))
        turned_ref[n] = rows.T
    lane = jax.lax.broadcasted_iota(jnp.int32, (outputs, LANES), 1)
    table = None if coding.levels is None else _table(coding.levels, lane)

    def tile(t, _):
        """128 inputs: t counts them, and part is where in the 128 bytes that hold them they begin."""
        byte, part = jax.lax.div(t, per_byte), jax.lax.rem(t, per_byte)
        codes = codes_ref[:, pl.ds(pl.multiple_of(byte * LANES, LANES), LANES)].astype(jnp.int32)
        if per_byte > 1:
            codes = _pick(codes, part * (LANES // per_byte) + jax.lax.div(lane, per_byte))
            codes = (codes >> (jax.lax.rem(lane, per_byte) * coding.bits)) & (2**coding.bits - 1)
        at, sign = first + t * LANES, 2 ** (coding.bits - 1)
        groups = at // group if isinstance(at, int) else jax.lax.div(at, group)
        slab = jax.lax.div(groups, LANES) * LANES
        within = jax.lax.div(at + lane, group) - slab
        scale, *zero = (
            _pick(turned_ref[n, :, pl.ds(pl.multiple_of(slab, LANES), LANES)], within) for n in range(len(columns))
        )
        signed = codes if per_byte == 1 else (codes ^ sign) - sign
        values = signed.astype(jnp.float32) if table is None else _pick(table, codes)
        values = (values - zero[0] if zero else values) * scale
        w_ref[:, pl.ds(pl.multiple_of(t * LANES, LANES), LANES)] = values.astype(w_ref.dtype)
        return 0

    jax.lax.fori_loop(0, w_ref.shape[1] // LANES, tile, 0)


def _table(levels, lane):
    """Each level in the lane of its code."""
    table = jnp.zeros(lane.shape, jnp.float32)
    for code, level in enumerate(levels):
        table = jnp.where(lane == code, jnp.float32(level), table)
    return table


def _pick(x, lanes):
    """`x[:, lanes]`, each row with its own: one instruction for 8 rows."""
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def _call(kernel, grid, in_specs, out_specs, operands, out, scratch, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    x, codes = operands[:2]
    read = x.nbytes + sum(c.nbytes for c in operands[1:]) * grid[0]
    read += x.nbytes * (grid[1] - 1 if len(grid) == 3 else 0)
    per_byte = scratch[0][0][1] // in_specs[1].block_shape[1]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out,
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(x) * codes.size * per_byte,
            bytes_accessed=read + out.size * out.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="weight_only" if len(grid) == 2 else "weight_only_back",
    )(*operands)
