"""Facts of compiled programs: hand-written HLO with answers by hand, then programs whose collectives are known."""

import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.chips import CHIPS, Chip
from jaxllm.errors import UserError
from jaxllm.plan.bounds import seconds_of, speed_of
from jaxllm.plan.program import facts, from_text
from jaxllm.plan.target import parse_target
from jaxllm.plan.traffic import Flow

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
#: 100 cycles and 1000 bytes a second within a slice, 10 bytes a second between slices.
SLOW = Chip("slow", bf16=1.0, hbm=1.0, hbm_bandwidth=1.0, ici=1000.0, dcn=10.0, torus=2, clock=100.0)


def module(entry: str, before: str = "", partitions: int = 8) -> str:
    """A scheduled module whose entry has these lines; p is f32[100], s is s32[]."""
    head = f"HloModule jit_step, is_scheduled=true, num_partitions={partitions}\n\n"
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
    add += "  ROOT %sum = f32[] add(%a, %b)\n}\n\n"
    start = "ENTRY %main (p: f32[100], s: s32[]) -> f32[100] {\n  %p = f32[100]{0} parameter(0)\n"
    return head + add + before + start + "  %s = s32[] parameter(1)\n" + entry + "\n}\n"


def cycles(n: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'


def one(text: str, mesh=MESH, **options):
    (row,) = from_text(text, mesh, **options).collectives
    return row


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp", 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("{{0,5,2,7},{1,4,3,6}}", "data fsdp tensor", 4),
        ("{{0,1,2,3,4,5,6,7}}", "data fsdp tensor", 8),
        ("{}", "data fsdp tensor", 8),
        ("[4,2]<=[8]", "tensor", 2),
        ("[2,4]<=[8]", "fsdp tensor", 4),
        ("[2,4]<=[4,2]T(1,0)", "data fsdp", 4),
        ("[4,2]<=[2,2,2]T(2,0,1)", "fsdp", 2),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", "fsdp", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "data fsdp", 4),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_0','axis_1'}", "data fsdp tensor", 8),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", "data", 2),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", "fsdp tensor", 4),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", "data tensor", 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp tensor", 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data", 2),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", "tensor", 2),
        ("mesh[a=4,b=2] {b}", "tensor", 2),
    ],
)
def test_axes_from_replica_groups(groups, axes, size):
    row = one(module(f"  ROOT %r = f32[100]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"))
    assert (row.kind, row.axes, row.group, row.network) == ("all-reduce", tuple(axes.split()), size, "ici")
    assert row.wire_bytes == pytest.approx(400 * 2 * (size - 1) / size)


@pytest.mark.parametrize(
    "pairs, axes",
    [
        ("{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}", "tensor"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("{{0,0},{4,1},{1,2},{5,3},{2,4},{6,5},{3,6},{7,7}}", "data fsdp tensor"),
    ],
)
def test_axes_from_pairs(pairs, axes):
    row = one(module(f"  ROOT %r = f32[100]{{0}} collective-permute(%p), channel_id=1, source_target_pairs={pairs}"))
    assert (row.kind, row.axes, row.wire_bytes) == ("collective-permute", tuple(axes.split()), 400)


@pytest.mark.parametrize(
    "line, kind, payload, wire",
    [
        ("f32[800]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}", "all-gather", 3200, 2800),
        ("f32[50]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], to_apply=%add", "reduce-scatter", 400, 200),
        ("f32[100]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add", "all-reduce", 400, 700),
        ("f32[100]{0} all-to-all(%p), replica_groups=[2,4]<=[8]", "all-to-all", 400, 300),
        ("(f32[100]{0}, f32[100]{0}) all-reduce(%p, %p), replica_groups=[1,8]<=[8], to_apply=%add", None, 800, 1400),
        ("f32[100]{0} ragged-all-to-all(%p, %p, %s, %s, %s, %s), replica_groups=[2,4]<=[8]", None, 400, 300),
        ("f32[100]{0} collective-broadcast(%p), replica_groups=[2,4]<=[8]", "collective-broadcast", 400, 400),
    ],
)
def test_bytes_on_the_wire(line, kind, payload, wire):
    row = one(module(f"  ROOT %r = {line}"))
    assert row.kind == kind or (kind is None and row.kind in line)
    assert (row.payload_bytes, row.wire_bytes) == (payload, wire)
    assert (row.overlapped_bytes, row.exposed_bytes, row.count) == (0, wire, 1)


def test_a_program_of_another_mesh_is_refused():
    with pytest.raises(UserError, match=r"program of 4 partitions, but the mesh \(data=2, fsdp=2, tensor=2\) has 8"):
        from_text(module("  ROOT %r = f32[100]{0} copy(%p)", partitions=4), MESH)


def loop(condition: str, body: str, state: str, name: str = "w") -> tuple[str, str]:
    """`(computations, lines)` of a loop over (s32[], f32[100], s32[]), with an all-gather of 8 in its body."""
    kind = "(s32[], f32[100]{0}, s32[])"
    parts = f"  %t = {kind} parameter(0)\n  %i = s32[] get-tuple-element(%t), index=0\n"
    parts += "  %x = f32[100]{0} get-tuple-element(%t), index=1\n  %n = s32[] get-tuple-element(%t), index=2\n"
    text = f"%{name}_cond (t: {kind}) -> pred[] {{\n{parts}{condition}\n}}\n\n"
    text += f"%{name}_body (t: {kind}) -> {kind} {{\n{parts}{body}\n"
    text += f"  ROOT %out = {kind} tuple(%j, %y, %n)\n}}\n\n"
    return text, f"{state}\n  %{name} = {kind} while(%init), condition=%{name}_cond, body=%{name}_body"


GATHER = "  %g = f32[800]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}\n"
GATHER += "  %y = f32[100]{0} slice(%g), slice={[0:100]}\n"
FUSED = "%fused (a: s32[], b: s32[]) -> pred[] {\n  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n"
FUSED += "  ROOT %c = pred[] compare(%a, %b), direction=LT\n}\n\n"


@pytest.mark.parametrize(
    "start, limit, condition, step, trips",
    [
        (0, 7, "  ROOT %c = pred[] compare(%i, %k), direction=LT", "add(%i, %one)", 7),
        (1, 7, "  ROOT %c = pred[] compare(%i, %k), direction=LT", "add(%i, %one)", 6),
        (1, 7, "  ROOT %c = pred[] compare(%i, %k), direction=LE", "add(%one, %i)", 7),
        (0, 7, "  ROOT %c = pred[] compare(%i, %k), direction=LT", "add(%i, %two)", 4),
        (9, 2, "  ROOT %c = pred[] compare(%i, %k), direction=GT", "subtract(%i, %two)", 4),
        (9, 1, "  ROOT %c = pred[] compare(%i, %k), direction=GE", "subtract(%i, %two)", 5),
        (0, 7, "  ROOT %c = pred[] compare(%i, %k), direction=NE", "add(%i, %one)", 7),
        (0, 5, "  ROOT %c = pred[] compare(%i, %n), direction=LT", "add(%i, %one)", 5),  # the limit is carried along
        (0, 7, "  ROOT %f = pred[] fusion(%i, %k), kind=kLoop, calls=%fused", "add(%i, %one)", 7),
        (3, 3, "  ROOT %c = pred[] compare(%i, %k), direction=LT", "add(%i, %one)", 0),
        (0, 7, "  ROOT %c = pred[] compare(%i, %k), direction=LT", "multiply(%i, %two)", None),
        (0, "s", "  ROOT %c = pred[] compare(%i, %n), direction=LT", "add(%i, %one)", None),
    ],
)
def test_trip_counts(start, limit, condition, step, trips):
    ints = "  %one = s32[] constant(1)\n  %two = s32[] constant(2)\n"
    bound = "" if limit == "s" else f"  %limit = s32[] constant({limit})\n"
    state = f"{bound}  %zero = s32[] constant({start})\n  %start = s32[] copy(%zero)\n"
    state += f"  %init = (s32[], f32[100]{{0}}, s32[]) tuple(%start, %p, %{'s' if limit == 's' else 'limit'})"
    constant = f"  %k = s32[] constant({limit})\n" if limit != "s" else ""
    before, lines = loop(constant + condition, ints + GATHER + f"  %j = s32[] {step}", state)
    program = from_text(
        module(lines + "\n  ROOT %r = f32[100]{0} get-tuple-element(%w), index=1", FUSED + before), MESH
    )
    assert program.loops == (("w_body", trips, 1),)
    assert sum(row.count for row in program.collectives) == (1 if trips is None else trips)


def test_what_the_compiler_says_of_a_loop_counts_first():
    before, lines = loop(
        "  ROOT %c = pred[] custom-call(%t)", GATHER + "  %j = s32[] copy(%i)", "  %init = tuple(%s, %p, %s)"
    )
    lines += ', backend_config={"known_trip_count":{"n":"12"},"known_induction_variable":{"tuple_index":"0"}}'
    assert one(module(lines, before)).count == 12


def test_a_loop_in_a_loop_multiplies_and_knows_the_outer_constants():
    """The inner limit is a constant of the entry that the outer loop hands on."""
    ints = "  %one = s32[] constant(1)\n  %none = s32[] constant(0)\n"
    inner, enter = loop(
        "  ROOT %c = pred[] compare(%i, %n), direction=LT", ints + GATHER + "  %j = s32[] add(%i, %one)", "", "v"
    )
    enter = "  %init = (s32[], f32[100]{0}, s32[]) tuple(%none, %x, %n)\n" + enter
    enter += "\n  %y = f32[100]{0} get-tuple-element(%v), index=1\n  %j = s32[] add(%i, %one)"
    limit = "  %k = s32[] constant(3)\n  ROOT %c = pred[] compare(%i, %k), direction=LT"
    state = "  %five = s32[] constant(5)\n  %zero = s32[] constant(0)\n"
    state += "  %init = (s32[], f32[100]{0}, s32[]) tuple(%zero, %p, %five)"
    outer, lines = loop(limit, ints + enter, state)
    program = from_text(module(lines, inner + outer), MESH)
    assert dict(((body, trips), runs) for body, trips, runs in program.loops) == {("w_body", 3): 1, ("v_body", 5): 3}
    assert program.collectives[0].count == 15


START = "  %g = (f32[100]{0}, f32[800]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}\n"


@pytest.mark.parametrize("compute, exposed", [(0, 2800), (100, 1800), (250, 300), (1000, 0)])
def test_a_pair_hides_behind_the_compute_between(compute, exposed):
    """2800 bytes take 2.8 s, a cycle 10 ms."""
    lines = f"{START}  %c = f32[100]{{0}} sine(%p), {cycles(compute)}\n  %d = f32[800]{{0}} all-gather-done(%g)\n"
    program = from_text(module(lines + f"  ROOT %r = f32[100]{{0}} cosine(%p), {cycles(500)}"), MESH, SLOW)
    (row,) = program.collectives
    assert row.exposed_bytes == pytest.approx(exposed) and row.overlapped_bytes == pytest.approx(2800 - exposed)
    assert (row.between_cycles, program.cycles, program.seconds) == (compute, compute + 500, (compute + 500) / 100)


def test_a_group_with_a_third_of_the_links_hides_less():
    """2800 bytes at a third of 1,000 a second take 8.4 s, of which 3 s of compute hide 1,000 bytes."""
    lines = f"{START}  %c = f32[100]{{0}} sine(%p), {cycles(300)}\n  ROOT %d = f32[800]{{0}} all-gather-done(%g)\n"
    (row,) = from_text(module(lines), MESH, SLOW, speed=lambda exchange: 1000 / 3).collectives
    assert row.overlapped_bytes == pytest.approx(1000) and row.exposed_bytes == pytest.approx(1800)


def test_what_overlaps_and_what_bounds_a_step_go_by_the_same_links():
    target = parse_target("v5p:4x4x4")
    sizes = {"data": 1, "fsdp": 64}
    (line, whole) = (speed_of(target, sizes)(Flow("all-gather", ("fsdp",), group, 1.0)) for group in (4, 64))
    assert line == pytest.approx(whole / 3) and whole == pytest.approx(0.8 * target.chip.device.ici)
    assert seconds_of(Flow("all-gather", ("fsdp",), 4, line), sizes, target) == pytest.approx(1.0)


def test_two_pairs_share_the_link():
    """5.6 s of transfers behind 3 s of compute: alone, each would seem hidden but for nothing."""
    second = START.replace("%g", "%h")
    lines = f"{START}{second}  %c = f32[100]{{0}} sine(%p), {cycles(300)}\n  %d = f32[800]{{0}} all-gather-done(%g)\n"
    row = one(module(lines + "  ROOT %e = f32[800]{0} all-gather-done(%h)"), chip=SLOW)
    assert row.exposed_bytes == pytest.approx(2600) and row.overlapped_bytes == pytest.approx(3000)


def test_a_synchronous_one_waits_and_is_exposed():
    lines = f"  %c = f32[100]{{0}} sine(%p), {cycles(300)}\n"
    lines += "  %g = f32[800]{0} all-gather(%p), replica_groups=[1,8]<=[8]\n"
    row = one(module(lines + f"  ROOT %r = f32[100]{{0}} cosine(%p), {cycles(500)}"), chip=SLOW)
    assert (row.exposed_bytes, row.overlapped_bytes, row.between_cycles) == (2800, 0, 0)


def chain(n: int, sources: str) -> tuple[str, str]:
    """`(computations, lines)` of an async collective fusion as in TPU programs: start, a step with compute, done.

    All share channel 1, as they do there.
    """
    gather = "f32[800]{0} all-gather(%q), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}"
    head = "(q: f32[100]) -> f32[800] {\n  %q = f32[100]{0} parameter(0)\n  %g = " + gather + "\n"
    both = "(f32[100]{0}, f32[800]{0}, u32[])"
    text = f'%start{n} {head}  ROOT %o = {both} custom-call(%g), custom_call_target="AsyncCollectiveStart"\n}}\n\n'
    text += f"%step{n} {head}  %x = f32[100]{{0}} sine(%q)\n  ROOT %o = {both} tuple(%x, %g, %q)\n}}\n\n"
    text += (
        f'%done{n} {head}  ROOT %o = f32[800]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"\n}}\n\n'
    )
    lines = f"  %b{n} = {both} fusion({sources}), kind=kCustom, calls=%start{n}\n"
    lines += f"  %e{n} = f32[100]{{0}} get-tuple-element(%b{n}), index=0\n"
    lines += f"  %m{n} = {both} fusion(%e{n}), kind=kOutput, calls=%step{n}, {cycles(200)}\n"
    lines += f"  %k{n} = f32[100]{{0}} get-tuple-element(%m{n}), index=1\n"
    return text, lines + f"  %z{n} = f32[800]{{0}} fusion(%k{n}), kind=kCustom, calls=%done{n}\n"


def test_an_async_collective_fusion_counts_once_and_hides_behind_its_steps():
    (first, a), (second, b) = chain(0, "%p"), chain(1, "%k0")
    row = one(module(a, first), chip=SLOW)
    assert (row.count, row.wire_bytes, row.between_cycles) == (1, 2800, 200)
    assert row.exposed_bytes == pytest.approx(800)
    # Two chains of one channel, the second one started between: neither is taken for a part of the other.
    a_lines, b_lines = a.splitlines(True), b.replace("%k0", "%p").splitlines(True)
    row = one(module("".join(a_lines[:1] + b_lines + a_lines[1:]), first + second), chip=SLOW)
    assert (row.count, row.wire_bytes) == (2, 5600)


def test_a_fusion_that_uses_what_a_step_computed_is_a_collective_of_its_own():
    text, lines = chain(0, "%p")
    scatter = "%all-reduce-scatter.1 (q: f32[100]) -> f32[50] {\n  %q = f32[100]{0} parameter(0)\n"
    scatter += "  %a = f32[100]{0} all-reduce(%q), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add\n"
    scatter += "  %i = s32[] constant(0)\n  ROOT %o = f32[50]{0} dynamic-slice(%a, %i), dynamic_slice_sizes={50}\n}\n\n"
    lines += "  %u = f32[100]{0} get-tuple-element(%m0), index=0\n"
    lines += "  ROOT %r = f32[50]{0} fusion(%u), kind=kCustom, calls=%all-reduce-scatter.1"
    rows = {row.kind: row for row in from_text(module(lines, text + scatter), MESH, SLOW).collectives}
    assert rows["reduce-scatter"].axes == ("tensor",) and rows["reduce-scatter"].payload_bytes == 400
    assert rows["reduce-scatter"].wire_bytes == rows["reduce-scatter"].exposed_bytes == 200  # half of an all-reduce
    assert rows["all-gather"].count == 1


def test_a_collective_on_a_sparse_core_starts_with_its_operand():
    inside = "%offloaded (q: f32[100]) -> f32[800] {\n  %q = f32[100]{0} parameter(0)\n"
    inside += "  ROOT %g = f32[800]{0} all-gather(%q), replica_groups=[1,8]<=[8], dimensions={0}\n"
    inside += '}, execution_thread="sparsecore"\n\n'
    lines = '  %b = ((), (), s32[8]) custom-call-start(), custom_call_target="x", called_computations={%offloaded}\n'
    lines += f"  %c = f32[100]{{0}} sine(%p), {cycles(300)}\n"
    lines += "  %u = ((f32[100]{0}), f32[800]{0}, s32[8]) custom-call-update(%b, %c)\n"
    lines += f"  %e = f32[100]{{0}} cosine(%p), {cycles(200)}\n  ROOT %d = f32[800]{{0}} custom-call-done(%u)"
    row = one(module(lines, inside), chip=SLOW)
    assert (row.kind, row.axes, row.count, row.between_cycles) == ("all-gather", ("data", "fsdp", "tensor"), 1, 200)
    assert row.exposed_bytes == pytest.approx(800)


SLICES = (0, 0, 0, 0, 1, 1, 1, 1)


def test_transfers_between_slices():
    """A program for two slices is one of four partitions; MegaScale carries each device's part to its like."""
    name = '_xla_host_transfer_rendezvous="all-gather.1_0",_xla_megascale_target="{1,2}x"'
    kind = f'frontend_attributes={{{name},_xla_megascale_transfer_type="ALL_GATHER"}}'
    lines = "  %t = token[] after-all()\n"
    lines += f"  %send = (f32[100]{{0}}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, {kind}\n"
    lines += f"  %c = f32[100]{{0}} sine(%p), {cycles(1000)}\n"
    lines += f"  %recv = (f32[200]{{0}}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, {kind}\n"
    lines += "  %sent = token[] send-done(%send), channel_id=2\n  %got = (f32[200]{0}, token[]) recv-done(%recv)\n"
    lines += "  %in = f32[200]{0} get-tuple-element(%got), index=0\n"
    lines += "  ROOT %g = f32[400]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}"
    program = from_text(module(lines, partitions=4), MESH, SLOW, slice_of=SLICES)
    rows = {row.network: row for row in program.collectives}
    assert (rows["dcn"].kind, rows["dcn"].axes, rows["dcn"].group) == ("all-gather", ("data",), 2)
    # 400 bytes at 10 a second behind 10 s of compute
    assert (rows["dcn"].payload_bytes, rows["dcn"].wire_bytes, rows["dcn"].exposed_bytes) == (800, 400, 300)
    assert (rows["ici"].axes, rows["ici"].wire_bytes) == (("fsdp", "tensor"), 1200)
    assert program.wire_bytes(network="dcn") == 400 and program.wire_bytes(axis="tensor") == 1200
    assert program.wire_bytes(kind="all-gather") == program.wire_bytes() == 1600


def test_groups_across_slices_in_one_program_cross_the_slow_network():
    for groups, network in (("[4,2]<=[2,4]T(1,0)", "dcn"), ("[4,2]<=[8]", "ici")):
        text = module(f"  ROOT %r = f32[100]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
        assert one(text, slice_of=SLICES).network == network


def product(line: str, left: str, right: str) -> dict[str, float]:
    lines = f"  %l = {left} copy(%p)\n  %m = {right} copy(%p)\n  ROOT %r = {line.format('%l, %m')}"
    return from_text(module(lines), MESH).matmul_flops


def test_flops_of_matrix_products():
    dot = "f32[3,4,6]{{2,1,0}} dot({}), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}, rhs_batch_dims={{0}}"
    assert product(dot, "bf16[3,4,5]{2,1,0}", "bf16[3,5,6]{2,1,0}") == {"bf16": 2 * 3 * 4 * 5 * 6}
    assert product(dot, "s8[3,4,5]{2,1,0}", "f32[3,5,6]{2,1,0}") == {"f32": 2 * 3 * 4 * 5 * 6}
    as_matmul = "bf16[7,9]{{1,0}} convolution({}), dim_labels=bf_io->bf"
    assert product(as_matmul, "bf16[7,8]{1,0:T(8,128)(2,1)S(1)}", "bf16[8,9]{1,0}") == {"bf16": 2 * 7 * 8 * 9}
    batched = "bf16[4,7,9]{{2,1,0}} convolution({}), window={{size=1}}, dim_labels=0bf_io0->0bf"
    assert product(batched, "bf16[4,7,8]{2,1,0}", "bf16[8,9,1]{2,1,0}") == {"bf16": 2 * 4 * 7 * 8 * 9}


@pytest.mark.parametrize(
    "stride, spread, gap, low, high", [(1, 1, 1, 1, 1), (2, 1, 1, 0, 1), (1, 3, 1, 2, 2), (1, 1, 2, 3, 0)]
)
def test_padding_and_dilation_of_a_convolution_multiply_nothing(stride, spread, gap, low, high):
    """Against a convolution of ones with ones, whose sum counts the products."""
    ones = np.zeros(6 * spread - spread + 1 + low + high)
    ones[low : len(ones) - high : spread] = 1
    kernel = np.zeros(2 * gap + 1)
    kernel[::gap] = 1
    made = np.correlate(ones, kernel, "valid")[::stride]
    window = f"size=3 stride={stride} pad={low}_{high} lhs_dilate={spread} rhs_dilate={gap}"
    line = f"f32[1,{len(made)},2]{{{{2,1,0}}}} convolution({{}}), window={{{{{window}}}}}, dim_labels=b0f_0io->b0f"
    assert product(line, "f32[1,6,4]{2,1,0}", "f32[3,4,2]{2,1,0}") == {"f32": 2 * made.sum() * 4 * 2}


def kernel(name: str, cost: str) -> str:
    config = f'backend_config={{"custom_call_config":{{"body":"a(b)c",{cost}"x":1}}}}'
    call = f'  %{name} = f32[100]{{0}} custom-call(%p), custom_call_target="tpu_custom_call"'
    return f"{call}, attributes={{kernel_metadata={{\n  {{x: 1}}\n}}}}, {config}\n"


def test_kernels_count_as_they_declare():
    cost = '"cost_estimate":{"flops":"123","transcendentals":"7","bytes_accessed":"4000"},'
    program = from_text(module(kernel("splash.1", cost) + kernel("splash.2", cost) + kernel("bare.3", "")), MESH)
    kernels = {k.name: k for k in program.kernels}
    assert (kernels["splash"].count, kernels["splash"].flops, kernels["splash"].bytes) == (2, 246, 8000)
    assert (kernels["bare"].count, kernels["bare"].flops, kernels["bare"].bytes) == (1, None, None)
    assert program.flops == 246 and program.hbm_bytes == 8000 + 800


def test_of_a_conditional_the_branch_that_works_counts():
    branches = "%do (q: f32[100]) -> f32[100] {\n  %q = f32[100]{0} parameter(0)\n"
    branches += f"  ROOT %x = f32[100]{{0}} sine(%q), {cycles(70)}\n}}\n\n"
    branches += "%skip (q: f32[100]) -> f32[100] {\n  ROOT %q = f32[100]{0} parameter(0)\n}\n\n"
    for call in ("branch_computations={%skip, %do}", "true_computation=%do, false_computation=%skip"):
        text = module(f"  ROOT %r = f32[100]{{0}} conditional(%s, %p, %p), {call}", branches)
        assert from_text(text, MESH).cycles == 70


def test_an_estimate_of_no_number_is_none():
    assert from_text(module(f"  ROOT %r = f32[100]{{0}} sine(%p), {cycles(2**63 - 1)}"), MESH).cycles == 0


def test_a_scan_reads_its_slice_and_not_the_stack():
    fused = "%pick (w: f32[50,100], i: s32[], a: f32[50,100], u: f32[1,100]) -> (f32[1,100], f32[50,100]) {\n"
    fused += "  %w = f32[50,100]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %a = f32[50,100]{1,0} parameter(2)\n"
    fused += "  %u = f32[1,100]{1,0} parameter(3)\n  %o = s32[] constant(0)\n"
    fused += "  %x = f32[1,100]{1,0} dynamic-slice(%w, %i, %o), dynamic_slice_sizes={1,100}\n"
    fused += "  %n = f32[50,100]{1,0} dynamic-update-slice(%a, %u, %i, %o)\n"
    fused += "  ROOT %t = (f32[1,100]{1,0}, f32[50,100]{1,0}) tuple(%x, %n)\n}\n\n"
    lines = "  %w = f32[50,100]{1,0} bitcast(%p)\n  %v = f32[1,100]{1,0:T(8,128)S(1)} bitcast(%p)\n"
    lines += "  ROOT %f = (f32[1,100]{1,0}, f32[50,100]{1,0}) fusion(%w, %s, %w, %v), kind=kLoop, calls=%pick"
    # slice in and out, update in and out, and the index
    assert from_text(module(lines, fused), MESH).hbm_bytes == 4 * 400 + 4


def mesh_of(devices, **axes) -> Mesh:
    types = (AxisType.Auto,) * len(axes)
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes), axis_types=types)


def exchanges(x_BD, w_DD):
    """Per device: 3 rounds of (permute, 2 rounds of a matmul), then one of each other collective."""
    ring = [(i, 1 - i) for i in range(2)]

    def inner(x_BD, _):
        return x_BD @ w_DD, None

    def outer(x_BD, _):
        x_BD = jax.lax.ppermute(x_BD, "tensor", ring)
        return jax.lax.scan(inner, x_BD, None, length=2)[0], None

    x_BD, _ = jax.lax.scan(outer, x_BD, None, length=3)
    gathered = jax.lax.all_gather(x_BD, "fsdp", tiled=True)
    scattered = jax.lax.psum_scatter(x_BD, ("data", "fsdp"), tiled=True)
    swapped = jax.lax.all_to_all(x_BD, "data", 0, 1, tiled=True)
    return jax.lax.psum(x_BD, ("data", "tensor")), gathered, scattered, swapped


B, D = 64, 32
EXPECTED = {
    ("collective-permute", ("tensor",)): (3, B * D * 4),
    ("all-gather", ("fsdp",)): (1, 2 * B * D * 4 / 2),
    ("reduce-scatter", ("data", "fsdp")): (1, B * D * 4 * 3 / 4),
    ("all-to-all", ("data",)): (1, B * D * 4 / 2),
    ("all-reduce", ("data", "tensor")): (1, 2 * B * D * 4 * 3 / 4),
}


def compiled(mesh, batch: int, width: int):
    spec, everywhere = P(("data", "fsdp", "tensor")), P()
    mapped = jax.shard_map(exchanges, mesh=mesh, in_specs=(spec, everywhere), out_specs=spec, check_vma=False)
    shapes = ((batch * mesh.size, width), spec), ((width, width), everywhere)
    return (
        jax.jit(mapped)
        .lower(*(jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in shapes))
        .compile()
    )


def test_a_program_on_eight_devices():
    program = facts(compiled(mesh_of(jax.devices(), data=2, fsdp=2, tensor=2), B, D), mesh_of(jax.devices(), **MESH))
    rows = {(row.kind, row.axes): (row.count, row.wire_bytes / row.count) for row in program.collectives}
    assert rows == EXPECTED
    assert program.devices == 8 and program.matmul_flops == {"f32": 6 * 2 * B * D * D}
    assert {(trips, runs) for _, trips, runs in program.loops} == {(3, 1), (2, 3)}
    arguments, outputs = B * D * 4 + D * D * 4, B * D * 4 * (1 + 2 + 1 / 4 + 1)
    assert program.memory.arguments == arguments
    assert abs(program.memory.outputs - outputs) < 64  # and the pointers of a tuple
    memory = program.memory
    assert memory.total == memory.arguments + memory.outputs - memory.aliased + memory.temporaries > arguments + outputs
    loaded = json.loads(json.dumps(program.to_dict()))
    assert loaded["memory"]["total"] == memory.total and loaded["flops"] == program.flops
    assert loaded["wire_bytes"] == program.wire_bytes() == sum(n * each for n, each in EXPECTED.values())


def test_five_megabytes_in_three_seconds():
    """A scanned 70B step has 2 to 5 MB of text, most of it in lines like these."""
    body = "".join(
        f"  %f.{n} = bf16[64,128]{{1,0:T(8,128)(2,1)S(1)}} fusion(%x.{n}, %f.{max(n - 1, 0)}), kind=kLoop, calls=%add, "
        f'metadata={{op_name="{"jit(step)/" * 8}"}}, {cycles(n)}, config={{{"a:b," * 60}}}\n'
        for n in range(8000)
    )
    text = module(body + "  ROOT %r = f32[100]{0} copy(%p)")
    assert len(text) > 4e6
    start = time.perf_counter()
    assert from_text(text, MESH, CHIPS["v5p"]).cycles == sum(range(8000))
    assert time.perf_counter() - start < 3


@pytest.mark.tpu_programs
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # which holds no such programs
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_program_for_absent_tpus():
    from jaxllm.plan.topology import parse_topology, topology_devices

    topology = parse_topology("v5p:2x2x2")
    mesh = mesh_of(topology_devices(topology), **MESH)
    program = facts(compiled(mesh, 512, 256), mesh, topology.chip)
    rows = {(row.kind, row.axes): (row.count, row.wire_bytes / row.count) for row in program.collectives}
    assert rows == {key: (count, wire * 512 * 256 / (B * D)) for key, (count, wire) in EXPECTED.items()}
    assert sum(program.matmul_flops.values()) == 6 * 2 * 512 * 256 * 256
    assert 0 < program.cycles and program.seconds == program.cycles / topology.chip.clock
    assert program.seconds > program.flops / topology.chip.bf16
    for row in program.collectives:
        assert row.overlapped_bytes + row.exposed_bytes == pytest.approx(row.wire_bytes)
    assert program.memory.arguments == 512 * 256 * 4 + 256 * 256 * 4
