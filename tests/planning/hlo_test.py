"""Tests of `declip_jax.planning.hlo`: small functions, against figures worked out by hand, and HLO of TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from declip_jax.planning import hlo
from declip_jax.sharding import make_mesh

ROWS, WIDTH = 64, 32
SHARD = ROWS * WIDTH * 4 / 8  # bytes on each of eight devices


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(4, 2)


def compiled(function, mesh):
  """The traffic of a function that every device applies to its shard."""
  rows = PartitionSpec(("data", "fsdp"))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, rows))
  return hlo.traffic(jax.jit(mapped).lower(x).compile().as_text(), mesh.size)


@pytest.mark.parametrize(
  ("kind", "sent", "function"),
  [
    ("all-reduce", 2 * SHARD * 3 / 4, lambda x: jax.lax.psum(x, "data")),
    ("all-reduce", 2 * SHARD * 1 / 2, lambda x: jax.lax.psum(x, "fsdp")),
    ("all-reduce", 2 * SHARD * 7 / 8, lambda x: jax.lax.psum(x, ("data", "fsdp"))),
    ("all-gather", SHARD * 3, lambda x: jax.lax.all_gather(x, "data")[0]),
    ("reduce-scatter", SHARD * 3 / 4, lambda x: jax.lax.psum_scatter(x, "data", tiled=True)),
    ("all-to-all", SHARD * 3 / 4, lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True)),
    ("collective-permute", SHARD, lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])),
  ],
)
@pytest.mark.parametrize("iterations", [1, 5])
def test_a_collective_costs_as_much_as_its_best_algorithm_in_every_iteration(mesh, kind, sent, function, iterations):
  def looped(x):
    def body(x, _):
      y = function(x)
      return x * 0.5 + jnp.sum(y), None

    return jax.lax.scan(body, x, length=iterations)[0]

  found = compiled(function if iterations == 1 else looped, mesh)
  assert found.collectives == {kind: iterations}
  assert found.links == {kind: pytest.approx(iterations * sent)}
  assert not found.network


def test_a_conditional_counts_the_branch_that_sends_least(mesh):
  def maybe(x, least):
    def much(x):
      return jax.lax.psum(x, "data")

    return jax.lax.cond(x[0, 0] > 0, much, lambda x: jax.lax.psum(x[:least], "data").sum() + x, x)

  assert compiled(partial(maybe, least=0), mesh).links.total() == 0
  assert compiled(partial(maybe, least=2), mesh).links.total() == pytest.approx(2 * SHARD / 4 * 3 / 4)


def traffic_of(function, *shapes):
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return hlo.traffic(jax.jit(function).lower(*shapes).compile().as_text(), 1).memory


def test_memory_traffic_counts_reads_and_writes():
  size = 4 * 1000 * 100
  assert traffic_of(lambda x: jnp.exp(x) + 1, (1000, 100)) == 2 * size
  assert traffic_of(lambda x, y: (x + y) * y, (1000, 100), (1000, 100)) == 3 * size


def test_a_loop_reads_and_writes_slices():
  rows, width = 50, 10_000
  sums = traffic_of(lambda x: jax.lax.map(lambda row: jnp.cumsum(jnp.sin(row)), x), (rows, width))
  assert 2 * 4 * rows * width <= sums < 20 * 4 * rows * width  # not as many for every row


# Two fusions in a third, as on a TPU: one slices a layer from a stack, one updates a layer of another stack.
NESTED = """
%take (p: f32[12,100], i: s32[]) -> f32[100] {
  %p = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %layer = f32[1,100]{1,0} dynamic-slice(%p, %i, %zero.1), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%layer)
}

%put (q: f32[12,100], v: f32[100], j: s32[]) -> f32[12,100] {
  %q = f32[12,100]{1,0} parameter(0)
  %v = f32[100]{0} parameter(1)
  %j = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %row = f32[1,100]{1,0} bitcast(%v)
  ROOT %all = f32[12,100]{1,0} dynamic-update-slice(%q, %row, %j, %zero.2)
}

%both (x: f32[12,100], y: f32[12,100], n: s32[]) -> f32[12,100] {
  %n = s32[] parameter(2)
  %y = f32[12,100]{1,0} parameter(1)
  %x = f32[12,100]{1,0} parameter(0)
  %taken = f32[100]{0} fusion(%x, %n), kind=kLoop, calls=%take
  %sine = f32[100]{0} sine(%taken)
  ROOT %there = f32[12,100]{1,0} fusion(%y, %sine, %n), kind=kLoop, calls=%put
}

ENTRY %main (a: f32[12,100], k: s32[]) -> f32[12,100] {
  %a = f32[12,100]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %b = f32[12,100]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = f32[12,100]{1,0} fusion(%a, %b, %k), kind=kOutput, calls=%both
}
"""


def test_nested_fusions_read_and_write_slices_and_a_buffer_costs_nothing():
  layer, index = 4 * 100, 4
  assert hlo.traffic(NESTED, 1).memory == 2 * layer + index


# A fusion that only renames an array, in a fusion that reads all of it.
RENAMED = """
%rename (p: f32[12,100]) -> f32[1200] {
  %p = f32[12,100]{1,0} parameter(0)
  ROOT %flat = f32[1200]{0} bitcast(%p)
}

%outer (x: f32[12,100]) -> f32[1200] {
  %x = f32[12,100]{1,0} parameter(0)
  %named = f32[1200]{0} fusion(%x), kind=kLoop, calls=%rename
  ROOT %sine = f32[1200]{0} sine(%named)
}

ENTRY %main (a: f32[12,100]) -> f32[1200] {
  %a = f32[12,100]{1,0} parameter(0)
  ROOT %out = f32[1200]{0} fusion(%a), kind=kOutput, calls=%outer
}
"""


def test_an_array_returned_by_a_nested_fusion_is_read_by_its_user():
  assert hlo.traffic(RENAMED, 1).memory == 2 * 4 * 1200


# How libtpu writes a reduce-scatter, here of the candidates' gradients of CLIP's loss on v5e:2x2.
SCATTERED = """
%all-reduce-scatter.2 (p: f32[256,128], q: f32[256,128]) -> (f32[64,128], f32[64,128]) {
  %p = f32[256,128]{1,0:T(8,128)S(1)} parameter(0)
  %q = f32[256,128]{1,0:T(8,128)S(1)} parameter(1)
  %sums = (f32[256,128]{1,0}, f32[256,128]{1,0}) all-reduce(%p, %q), replica_groups={{0,1,2,3}}, to_apply=%add.17.clone
  %first = f32[256,128]{1,0:T(8,128)} get-tuple-element(%sums), index=0
  %id = u32[] partition-id()
  %rows = u32[] constant(64)
  %row = u32[] multiply(%id, %rows)
  %zero = u32[] constant(0)
  %slice.1 = f32[64,128]{1,0} dynamic-slice(%first, %row, %zero), dynamic_slice_sizes={64,128}
  %second = f32[256,128]{1,0:T(8,128)} get-tuple-element(%sums), index=1
  %slice.2 = f32[64,128]{1,0} dynamic-slice(%second, %row, %zero), dynamic_slice_sizes={64,128}
  ROOT %tuple = (f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%slice.1, %slice.2)
}

%add.17.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[256,128], b: f32[256,128]) -> (f32[64,128], f32[64,128]) {
  %a = f32[256,128]{1,0} parameter(0)
  %b = f32[256,128]{1,0} parameter(1)
  ROOT %out = (f32[64,128]{1,0}, f32[64,128]{1,0}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.2, EMITTER
}
"""


@pytest.mark.parametrize(
  ("emitter", "kind", "times"),
  [
    ("AllReduceScatterFusion", "reduce-scatter", 1),
    ("SingleInputAllReduceScatterFusion", "reduce-scatter", 1),
    ("AllReduceFusion", "all-reduce", 2),
  ],
)
def test_a_fused_all_reduce_and_slice_of_a_tpu_is_a_reduce_scatter(emitter, kind, times):
  config = f'backend_config={{"collective_algorithm_config":{{"emitter":"{emitter}","strategy":"StrategyRing"}}}}'
  found = hlo.traffic(SCATTERED.replace("EMITTER", config), 4)
  assert (found.collectives, found.links) == ({kind: 1}, {kind: times * 2 * 256 * 128 * 4 * 3 / 4})


# An asynchronous all-gather of a TPU, a chain of fusions, in a loop without an annotated number of iterations.
CHAIN = """
%start (p: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[32,4]{1,0} all-gather(%p), replica_groups=GROUPS, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %c.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[8,4]) -> bf16[32,4] {
  %q = bf16[8,4]{1,0} parameter(0)
  %g.2 = bf16[32,4]{1,0} all-gather(%q), replica_groups=GROUPS, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %c.2 = bf16[32,4]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%condition (s: (s32[], bf16[8,4])) -> pred[] {
  %s = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t = (s32[], bf16[8,4]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %fusion.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0:S(1)}) fusion(%x), kind=kCustom, calls=%start
  %y = bf16[8,4]{1,0} get-tuple-element(%fusion.1), index=0
  %fusion.2 = bf16[32,4]{1,0:S(1)} fusion(%y), kind=kCustom, calls=%done
  %next = s32[] add(%j, %two)
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%next, %y)
}

ENTRY %main (a: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %a = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %while = (s32[], bf16[8,4]{1,0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
  ("groups", "size", "slices"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", 4, 1),
    ("{}", 8, 2),
    ("[2,4]<=[8]", 4, 1),
    ("[2,4]<=[4,2]T(1,0)", 4, 2),
    ("mesh['x'=2,'y'=4] {'y'}", 4, 1),
    ("mesh['x'=2,'y'=4] {'x','y'}", 8, 2),
    ("mesh['x'=4,'z'=1,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4, 1),
    ("mesh['x'=4,'z'=1,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", 2, 2),
  ],
)
def test_a_chain_counts_once_and_groups_are_parsed_in_all_notations(groups, size, slices):
  found = hlo.traffic(CHAIN.replace("GROUPS", groups), 8, 2)
  shard, iterations = 8 * 4 * 2, 6
  # Each device exchanges its shard between slices; then its slice gathers what its devices received.
  within = size // slices
  assert found.collectives == {"all-gather": iterations}
  assert found.links.total() == iterations * (within - 1) * slices * shard
  assert found.network.total() == iterations * (slices - 1) * shard
  # Each fusion reads the shard and the first one writes it; the result stays on the chip. The counter has 4 bytes.
  assert found.memory == iterations * (3 * shard + 3 * 4)


def test_unknown_groups_are_rejected():
  with pytest.raises(ValueError, match=r"replica_groups=mesh\['x'=8\] \{'x':\(1\)2\}"):
    hlo.traffic(CHAIN.replace("GROUPS", "mesh['x'=8] {'x':(1)2}"), 8)


def test_transfers_between_slices_are_network_traffic():
  text = """
ENTRY %main (a: f32[6]) -> token[] {
  %a = f32[6]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[6]{0}, u32[], token[]) send(%a, %t), frontend_attributes={_xla_megascale_transfer_type="KIND"}
  ROOT %d = token[] send-done(%s)
}
"""
  for kind, factor in (("ALL_REDUCE", 2 * 2 / 3), ("ALL_GATHER", 2), ("REDUCE_SCATTER", 2 / 3)):
    found = hlo.traffic(text.replace("KIND", kind), 12, 3)
    assert found.network == {kind.lower().replace("_", "-"): pytest.approx(6 * 4 * factor)}
    assert not found.links
