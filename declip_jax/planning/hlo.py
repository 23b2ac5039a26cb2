"""Bytes that a compiled program sends between devices and moves through their memory, parsed from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and ignores collectives. Here the body of a loop counts once
per iteration. Of a conditional, the branch that sends least counts: a step without diagnostics, as in
`flops.num_flops`.
"""

from collections import Counter
from functools import cache
import math
import re
from typing import Any, NamedTuple

import numpy as np

# How often the whole array passes through a device's links with the best algorithm.
COLLECTIVES = {
  "all-gather": 1,
  "all-reduce": 2,  # a reduce-scatter and an all-gather
  "reduce-scatter": 1,
  "all-to-all": 1,
  "collective-permute": 1,
}
# These move nothing: they name parts of other arrays.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # these only name places in a TPU's memory
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Traffic(NamedTuple):
  """Bytes that each device moves in one call of a program.

  Attributes:
    collectives: kind -> number of collectives, in every iteration of their loops.
    links: kind -> bytes sent to devices of the same slice.
    network: kind -> bytes sent to devices of other slices.
    memory: bytes read from and written to main memory.
  """

  collectives: Counter[str]
  links: Counter[str]
  network: Counter[str]
  memory: float

  def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
    return Traffic(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

  def times(self, iterations: int) -> "Traffic":
    """The traffic of a loop with this body."""
    scaled = (Counter({kind: iterations * number for kind, number in counter.items()}) for counter in self[:3])
    return Traffic(*scaled, iterations * self.memory)


NOTHING = Traffic(Counter(), Counter(), Counter(), 0.0)


class _Instruction(NamedTuple):
  name: str
  result: str  # type and layout
  opcode: str
  operands: tuple[str, ...]
  arguments: str  # the text between the parentheses
  attributes: str  # the text after them
  is_root: bool


_Computation = dict[str, _Instruction]


def traffic(text: str, devices: int, slices: int = 1) -> Traffic:
  """The traffic of one call of a program.

  Every collective uses the best algorithm: between slices it exchanges arrays that were already reduced within each
  slice, or gathers shards before they are passed on within the slice. Array sizes do not include padding. Memory is
  what each fusion reads and writes; a fusion that slices an array reads the slice only. Arrays that the compiler keeps
  on the chip do not count.

  Args:
    text: `jax.stages.Compiled.as_text()`.
    devices: number of devices that run the program.
    slices: number of slices; each has the same number of consecutive devices.

  Raises:
    ValueError: a collective whose groups have an unknown notation.
  """
  computations = _parse(text)
  entry = next(name for name in computations if name.startswith("ENTRY "))
  started: set[str] = set()  # on a TPU one asynchronous collective is a chain of several instructions

  @cache
  def computation_traffic(name: str) -> Traffic:
    computation, total = computations[name], NOTHING
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        chain = re.search(r'chain_id="(\w+)"', instruction.attributes)
        if chain is None or chain[1] not in started:
          total += _collective(instruction, computation, kind, devices, slices)
        started.update(chain.groups() if chain else ())
      if kind == "send" and (between := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)):
        total += _between_slices(instruction, computation, between[1].lower().replace("_", "-"), slices)
      if kind == "while":
        condition, body = (re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)[1] for name in _LOOP)
        total += computation_traffic(body).times(_iterations(instruction, computations[condition], computations[body]))
      elif kind == "conditional":
        total += min(map(computation_traffic, _branches(instruction)), key=_sent)
      elif not kind.endswith(("-done", "-update")) and (called := _CALLED.findall(instruction.attributes)):
        inner = sum(map(computation_traffic, called), NOTHING)
        inner = _as_reduce_scatter(inner) if _SCATTERS in instruction.attributes else inner
        # Inside a fusion nothing passes through memory.
        total += inner if kind in ("call", "async") else inner._replace(memory=0.0)
      total += NOTHING._replace(memory=_memory(instruction, computation, computations))
    return total

  return computation_traffic(entry)


_LOOP = ("condition", "body")
# How libtpu compiles a reduce-scatter, an explicit one, too: an all-reduce and a slice, run by one emitter.
_SCATTERS = 'AllReduceScatterFusion"'


def _as_reduce_scatter(traffic: Traffic) -> Traffic:
  """The traffic of a fusion whose all-reduces only send each device the part that it keeps."""
  ratio = COLLECTIVES["reduce-scatter"] / COLLECTIVES["all-reduce"]

  def moved(counter: dict[str, float], factor: float) -> Any:
    others = {kind: x for kind, x in counter.items() if kind != "all-reduce"}
    others["reduce-scatter"] = others.get("reduce-scatter", 0) + factor * counter.get("all-reduce", 0)
    return Counter(others)

  collectives, links, network = map(moved, traffic[:3], (1, ratio, ratio))
  return Traffic(collectives, links, network, traffic.memory)


def _sent(traffic: Traffic) -> tuple[float, float]:
  return traffic.links.total() + traffic.network.total(), traffic.memory


def _parse(text: str) -> dict[str, _Computation]:
  """Computations by name; the name of the entry computation begins with "ENTRY "."""
  computations: dict[str, _Computation] = {}
  current: _Computation | None = None
  for line in text.splitlines():
    if not line.startswith(" "):
      header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
      if header:
        current = computations.setdefault((header[1] or "") + header[2], {})
    elif current is not None and (start := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
      rest = line[start.end() :]
      end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
      result, rest = rest[:end], rest[end:].lstrip()
      opcode, _, _ = rest.partition("(")
      end = _closing(rest, len(opcode))
      arguments = rest[len(opcode) + 1 : end]
      operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
      current[start[2]] = _Instruction(start[2], result, opcode, operands, arguments, rest[end + 1 :], bool(start[1]))
  return computations


def _closing(text: str, start: int) -> int:
  """The position at which the parenthesis at `start` closes."""
  depth = 0
  for position in range(start, len(text)):
    depth += (text[position] == "(") - (text[position] == ")")
    if not depth:
      return position
  raise ValueError(f"HLO: no closing parenthesis in {text[:200]!r}")


def _sizes(result: str, main_memory: bool = False) -> list[float]:
  """Bytes of each array of a type; with `main_memory`, 0 for those that are elsewhere, such as `S(1)`, on the chip."""
  sizes = []
  for dtype, shape, layout in _ARRAY.findall(result):
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
    counts = not main_memory or not re.search(r"S\([1-9]", layout)
    sizes.append(counts * bits / 8 * math.prod(map(int, filter(None, shape.split(",")))))
  return sizes


def _collective(instruction: _Instruction, computation: _Computation, kind: str, devices: int, slices: int) -> Traffic:
  shard = sum(sum(_sizes(computation[name].result)) for name in instruction.operands)
  per_slice = devices // slices
  if kind == "collective-permute":
    pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.partition("source_target_pairs=")[2]), int)
    crosses = bool(np.any(pairs[:, 0] // per_slice != pairs[:, 1] // per_slice))
    links, network = (0.0, shard) if crosses else (shard, 0.0)
  else:
    group = _group(instruction.attributes, devices)
    spanned = len(set(group // per_slice))
    size, within = len(group), len(group) // spanned
    whole = COLLECTIVES[kind] * shard * (size if kind == "all-gather" else 1)
    if kind == "all-to-all":  # a different piece to each device of the group
      links, network = whole * (within - 1) / size, whole * (spanned - 1) / spanned
    else:
      links, network = whole * (within - 1) / within, whole * (spanned - 1) / size
    if size == 1:
      return NOTHING
  return NOTHING._replace(
    collectives=Counter({kind: 1}), links=Counter({kind: links}), network=Counter({kind: network})
  )


def _between_slices(instruction: _Instruction, computation: _Computation, kind: str, slices: int) -> Traffic:
  """One collective over `slices`: TPU hosts exchange the arrays that their chips send them."""
  shard = sum(_sizes(computation[instruction.operands[0]].result))
  sent = COLLECTIVES.get(kind, 1) * shard * (slices - 1) / (1 if kind == "all-gather" else slices)
  kind = kind if kind in COLLECTIVES else "collective-permute"
  return NOTHING._replace(collectives=Counter({kind: 1}), network=Counter({kind: sent}))


def _group(attributes: str, devices: int) -> np.ndarray:
  """The devices of the first group of a collective; its other groups are equivalent."""
  text = attributes.partition("replica_groups=")[2]
  if text.startswith("{{"):
    return np.array(text[2 : text.index("}")].split(","), int)
  if text.startswith("{}"):
    return np.arange(devices)
  if grid := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
    return _iota(grid[2]).reshape(_ints(grid[1]))[0]
  if axes := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    wanted = re.findall(r"'(\w+)'", axes[3])
    if re.fullmatch(r"('\w+',?)*", axes[3]):  # whole axes only
      ids = _iota(axes[2]) if axes[2] else np.arange(devices)
      ids = ids.reshape([int(size) for size in sizes.values()])
      return ids[tuple(slice(None) if name in wanted else 0 for name in sizes)].reshape(-1)
  raise ValueError(f"HLO: unknown replica_groups={text[:120]}")


def _iota(text: str) -> np.ndarray:
  """`[2,4]T(1,0)`: device numbers counted up in shape `[2,4]`, then transposed."""
  shape, _, order = text.partition("T")
  ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _branches(instruction: _Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  return re.findall(r"%?([\w.\-]+)", listed[1]) if listed else _CALLED.findall(instruction.attributes)


def _iterations(loop: _Instruction, condition: _Computation, body: _Computation) -> int:
  """Number of iterations of a loop, from the compiler's annotation or the loop's condition; 1 if neither states it."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known[1])
  test = next(instruction for instruction in condition.values() if instruction.is_root)
  limits = [condition[name] for name in test.operands if condition[name].opcode == "constant"]
  counters = [condition[name] for name in test.operands if condition[name].opcode == "get-tuple-element"]
  if "direction=LT" not in test.attributes or len(limits) != 1 or len(counters) != 1:
    return 1
  index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
  updated = body[next(instruction for instruction in body.values() if instruction.is_root).operands[index]]
  steps = [body[name].arguments for name in updated.operands if body[name].opcode == "constant"]
  return math.ceil(int(limits[0].arguments) / int(steps[0] if updated.opcode == "add" and steps else 1))


def _memory(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
  """Bytes of main memory that an operation itself reads and writes, without those of the computations it calls."""
  opcode = instruction.opcode
  if opcode in (*_FREE, "while", "conditional", "call", "async-start") or opcode.endswith("-done"):
    return 0.0
  if opcode == "custom-call" and any(f'"{target}"' in instruction.attributes for target in _FREE_CALLS):
    return 0.0
  if opcode == "copy-start":  # from one memory to another
    return sum(_sizes(instruction.result, True)[:2])
  operands = [sum(_sizes(computation[name].result, True)) for name in instruction.operands]
  result = sum(_sizes(instruction.result, True))
  if opcode == "slice-start":
    moved = _sizes(instruction.result)[len(operands)]
    return moved * bool(operands[0]) + _sizes(instruction.result, True)[len(operands)]
  if opcode in ("dynamic-slice", "slice", "gather"):
    return result + (sum(_sizes(instruction.result)) if operands[0] else 0.0)
  if opcode == "dynamic-update-slice":
    return 2 * operands[1] if operands[0] else 0.0
  if opcode != "fusion":
    return sum(operands) + result
  fused = computations[_CALLED.search(instruction.attributes)[1]]
  parameters = [_parameter(fused, index) for index in range(len(operands))]
  read = sum(
    min(size, _read(name, fused, computations)[0]) for name, size in zip(parameters, operands, strict=True) if size
  )
  return read + min(result, _written(fused, instruction.result, computations))


def _parameter(computation: _Computation, index: int) -> str:
  """The name of a computation's parameter."""
  return next(x.name for x in computation.values() if (x.opcode, x.arguments) == ("parameter", str(index)))


def _read(name: str, fused: _Computation, computations: dict[str, _Computation]) -> tuple[float, bool]:
  """Bytes that a fusion and the fusions in it read of an array, and whether their result contains that array.

  Where they only slice the array, they read the slices. If their result contains it, its users may read more of it.
  """
  total, returned = 0.0, False
  for user in fused.values():
    if name not in user.operands:
      continue
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      total += sum(_sizes(user.result))
      continue
    aliased = user.opcode in ("bitcast", "tuple") or (
      user.opcode == "dynamic-update-slice" and user.operands[0] == name
    )
    if user.opcode == "fusion":
      within = computations[_CALLED.search(user.attributes)[1]]
      for index, operand in enumerate(user.operands):
        if operand == name:
          size, returned_within = _read(_parameter(within, index), within, computations)
          total, aliased = total + size, aliased or returned_within
    elif not aliased:
      return math.inf, returned
    if aliased:
      size, returned_by_users = _read(user.name, fused, computations)
      total, returned = total + size, returned or user.is_root or returned_by_users
  return total, returned


def _written(fused: _Computation, result: str, computations: dict[str, _Computation]) -> float:
  """Bytes that a fusion writes; for an array that it updates in place, only the update."""
  root = next(inner for inner in fused.values() if inner.is_root)
  outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
  sizes = _sizes(result, True)
  if len(sizes) != len(outputs):
    return sum(sizes)
  total = 0.0
  for output, size in zip(outputs, sizes, strict=True):
    computation = fused
    while output.opcode in ("bitcast", "fusion"):
      if output.opcode == "bitcast":
        output = computation[output.operands[0]]
      else:
        computation = computations[_CALLED.search(output.attributes)[1]]
        output = next(inner for inner in computation.values() if inner.is_root)
    update = output.opcode == "dynamic-update-slice"
    total += min(size, sum(_sizes(computation[output.operands[1]].result))) if update else size
  return total
