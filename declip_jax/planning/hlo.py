"""What a compiled program sends between devices and moves through their memory, read from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and no collectives. Here a loop counts times its turns; of a
conditional the branch counts that sends least, as in `flops.count`: a step without its diagnostics.
"""

from collections import Counter
from functools import cache
import math
import re
from typing import NamedTuple

import numpy as np

# The factor is how often the whole array passes through the links of a device, in the best algorithm.
COLLECTIVES = {
  "all-gather": 1,
  "all-reduce": 2,  # a reduce-scatter and an all-gather
  "reduce-scatter": 1,
  "all-to-all": 1,
  "collective-permute": 1,
}
# No operations of their own: names for parts of others, and what is counted where it starts.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # names for places in a TPU's memory
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Traffic(NamedTuple):
  """Bytes that each device moves in one call of a program.

  Attributes:
    collectives: kind -> how many there are, with the turns of their loops.
    links: kind -> bytes sent to devices of the same slice.
    network: kind -> bytes sent to those of other slices.
    memory: bytes read from and written to its main memory.
  """

  collectives: Counter[str]
  links: Counter[str]
  network: Counter[str]
  memory: float

  def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
    return Traffic(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

  def times(self, turns: int) -> "Traffic":
    """That of a loop."""
    scaled = (Counter({kind: turns * count for kind, count in part.items()}) for part in self[:3])
    return Traffic(*scaled, turns * self.memory)


NOTHING = Traffic(Counter(), Counter(), Counter(), 0.0)


class _Instruction(NamedTuple):
  name: str
  result: str  # its type
  opcode: str
  operands: tuple[str, ...]
  inside: str  # the text between its parentheses
  attributes: str
  root: bool


_Computation = dict[str, _Instruction]


def traffic(text: str, devices: int, slices: int = 1) -> Traffic:
  """The traffic of `jax.stages.Compiled.as_text()`, for a program over `devices` in equal `slices`, in order.

  A collective sends what the best algorithm would; between slices it exchanges what they already reduced within, or
  gathers parts before they are passed on within. Array sizes are without padding. Memory counts what each fusion reads
  and writes, slices as slices, and leaves out what the compiler keeps on the chip.

  Raises:
    ValueError: a collective whose groups are written in a way that is not known here.
  """
  computations = _parse(text)
  entry = next(name for name in computations if name.startswith("ENTRY "))
  started: set[str] = set()  # a TPU writes one asynchronous collective as a chain of several

  @cache
  def of(name: str) -> Traffic:
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
        condition, body = (re.search(rf"\b{part}=%?([\w.\-]+)", instruction.attributes)[1] for part in _LOOP)
        total += of(body).times(_turns(instruction, computations[condition], computations[body]))
      elif kind == "conditional":
        total += min((of(branch) for branch in _branches(instruction)), key=_sent)
      elif not kind.endswith(("-done", "-update")) and (called := _CALLED.findall(instruction.attributes)):
        inner = sum((of(part) for part in called), NOTHING)
        # Within a fusion nothing passes through memory.
        total += inner if kind in ("call", "async") else inner._replace(memory=0.0)
      total += NOTHING._replace(memory=_memory(instruction, computation, computations))
    return total

  return of(entry)


_LOOP = ("condition", "body")


def _sent(part: Traffic) -> tuple[float, float]:
  return part.links.total() + part.network.total(), part.memory


def _parse(text: str) -> dict[str, _Computation]:
  """Computations by name; the entry's name begins with "ENTRY "."""
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
      inside = rest[len(opcode) + 1 : end]
      operands = tuple(re.findall(r"%([\w.\-]+)", inside))
      current[start[2]] = _Instruction(start[2], result, opcode, operands, inside, rest[end + 1 :], bool(start[1]))
  return computations


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if not depth:
      return place
  raise ValueError(f"HLO: no closing parenthesis in {text[:200]!r}")


def _sizes(result: str, main_memory: bool = False) -> list[float]:
  """Bytes of each array of a type; with `main_memory` 0 for those that are elsewhere, as `S(1)` on the chip."""
  sizes = []
  for dtype, shape, layout in _ARRAY.findall(result):
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
    here = not main_memory or not re.search(r"S\([1-9]", layout)
    sizes.append(here * bits / 8 * math.prod(map(int, filter(None, shape.split(",")))))
  return sizes


def _collective(instruction: _Instruction, computation: _Computation, kind: str, devices: int, slices: int) -> Traffic:
  part = sum(sum(_sizes(computation[name].result)) for name in instruction.operands)
  per_slice = devices // slices
  if kind == "collective-permute":
    pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.partition("source_target_pairs=")[2]), int)
    crosses = bool(np.any(pairs[:, 0] // per_slice != pairs[:, 1] // per_slice))
    links, network = (0.0, part) if crosses else (part, 0.0)
  else:
    group = _group(instruction.attributes, devices)
    spanned = len(set(group // per_slice))
    size, within = len(group), len(group) // spanned
    whole = COLLECTIVES[kind] * part * (size if kind == "all-gather" else 1)
    if kind == "all-to-all":  # to each of the group a part of its own
      links, network = whole * (within - 1) / size, whole * (spanned - 1) / spanned
    else:
      links, network = whole * (within - 1) / within, whole * (spanned - 1) / size
    if size == 1:
      return NOTHING
  return NOTHING._replace(
    collectives=Counter({kind: 1}), links=Counter({kind: links}), network=Counter({kind: network})
  )


def _between_slices(instruction: _Instruction, computation: _Computation, kind: str, slices: int) -> Traffic:
  """A TPU's hosts exchange what its chips send them, one collective over `slices`."""
  part = sum(_sizes(computation[instruction.operands[0]].result))
  sent = COLLECTIVES.get(kind, 1) * part * (slices - 1) / (1 if kind == "all-gather" else slices)
  kind = kind if kind in COLLECTIVES else "collective-permute"
  return NOTHING._replace(collectives=Counter({kind: 1}), network=Counter({kind: sent}))


def _group(attributes: str, devices: int) -> np.ndarray:
  """The devices of one group of a collective; all its groups are alike."""
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
    if re.fullmatch(r"('\w+',?)*", axes[3]):  # and no part of an axis
      ids = _iota(axes[2]) if axes[2] else np.arange(devices)
      ids = ids.reshape([int(size) for size in sizes.values()])
      return ids[tuple(slice(None) if name in wanted else 0 for name in sizes)].reshape(-1)
  raise ValueError(f"HLO: unknown replica_groups={text[:120]}")


def _iota(text: str) -> np.ndarray:
  """`[2,4]T(1,0)`: counted up in this shape, then transposed."""
  shape, _, order = text.partition("T")
  ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _branches(instruction: _Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  return re.findall(r"%?([\w.\-]+)", listed[1]) if listed else _CALLED.findall(instruction.attributes)


def _turns(loop: _Instruction, condition: _Computation, body: _Computation) -> int:
  """How often a loop turns: as the compiler noted, or as its counter is compared; 1 where neither says."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known[1])
  test = next(instruction for instruction in condition.values() if instruction.root)
  limits = [condition[name] for name in test.operands if condition[name].opcode == "constant"]
  counters = [condition[name] for name in test.operands if condition[name].opcode == "get-tuple-element"]
  if "direction=LT" not in test.attributes or len(limits) != 1 or len(counters) != 1:
    return 1
  place = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
  after = body[next(instruction for instruction in body.values() if instruction.root).operands[place]]
  steps = [body[name].inside for name in after.operands if body[name].opcode == "constant"]
  return math.ceil(int(limits[0].inside) / int(steps[0] if after.opcode == "add" and steps else 1))


def _memory(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
  """Bytes of main memory that an operation reads and writes, those that others do for it left out."""
  opcode = instruction.opcode
  if opcode in (*_FREE, "while", "conditional", "call", "async-start") or opcode.endswith("-done"):
    return 0.0
  if opcode == "custom-call" and any(f'"{target}"' in instruction.attributes for target in _FREE_CALLS):
    return 0.0
  if opcode == "copy-start":  # from one memory to the other
    return sum(_sizes(instruction.result, True)[:2])
  here = [sum(_sizes(computation[name].result, True)) for name in instruction.operands]
  result = sum(_sizes(instruction.result, True))
  if opcode == "slice-start":
    moved = _sizes(instruction.result)[len(here)]
    return moved * bool(here[0]) + _sizes(instruction.result, True)[len(here)]
  if opcode in ("dynamic-slice", "slice", "gather"):
    return result + (sum(_sizes(instruction.result)) if here[0] else 0.0)
  if opcode == "dynamic-update-slice":
    return 2 * here[1] if here[0] else 0.0
  if opcode != "fusion":
    return sum(here) + result
  fused = computations[_CALLED.search(instruction.attributes)[1]]
  parameters = [_parameter(fused, place) for place in range(len(here))]
  read = sum(
    min(size, _read(name, fused, computations)[0]) for name, size in zip(parameters, here, strict=True) if size
  )
  return read + min(result, _written(fused, instruction.result, computations))


def _parameter(computation: _Computation, place: int) -> str:
  return next(inner.name for inner in computation.values() if (inner.opcode, inner.inside) == ("parameter", str(place)))


def _read(name: str, fused: _Computation, computations: dict[str, _Computation]) -> tuple[float, bool]:
  """Bytes of an array that a fusion, and those within it, read: slices, where they only take slices.

  And whether the fusion's result is that array, in part at least: then its users may read more of it.
  """
  total, passed_on = 0.0, False
  for user in fused.values():
    if name not in user.operands:
      continue
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      total += sum(_sizes(user.result))
      continue
    same = user.opcode in ("bitcast", "tuple") or (user.opcode == "dynamic-update-slice" and user.operands[0] == name)
    if user.opcode == "fusion":
      within = computations[_CALLED.search(user.attributes)[1]]
      for place, operand in enumerate(user.operands):
        if operand == name:
          more, passes_on = _read(_parameter(within, place), within, computations)
          total, same = total + more, same or passes_on
    elif not same:
      return math.inf, passed_on
    if same:
      more, further = _read(user.name, fused, computations)
      total, passed_on = total + more, passed_on or user.root or further
  return total, passed_on


def _written(fused: _Computation, result: str, computations: dict[str, _Computation]) -> float:
  """Bytes that a fusion writes: of an array that it updates in place, the update."""
  root = next(inner for inner in fused.values() if inner.root)
  outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
  sizes = _sizes(result, True)
  if len(sizes) != len(outputs):
    return sum(sizes)
  total = 0.0
  for output, size in zip(outputs, sizes, strict=True):
    where = fused
    while output.opcode in ("bitcast", "fusion"):
      if output.opcode == "bitcast":
        output = where[output.operands[0]]
      else:
        where = computations[_CALLED.search(output.attributes)[1]]
        output = next(inner for inner in where.values() if inner.root)
    update = output.opcode == "dynamic-update-slice"
    total += min(size, sum(_sizes(where[output.operands[1]].result))) if update else size
  return total
