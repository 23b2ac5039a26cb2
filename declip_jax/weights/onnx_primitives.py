"""Translates functions of JAX to ONNX, primitive by primitive; parameters become constants.

So towers are defined in `models` alone: a new layer needs nothing here unless it has a primitive that no layer had
before. What depends on constants alone is computed here, and loops over blocks are unrolled.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any

import jax
from jax import export
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

from declip_jax.weights.onnx_graph import Graph, Interface, Shape, Tensor, constant

Fields = Mapping[str, Any]  # the parameters of a primitive


def to_onnx(function: Callable[[Any, jax.Array], jax.Array], params: Any, interface: Interface) -> Graph:
  """The graph of a function for batches of any size; `Graph.save` writes it.

  Args:
    function: function of `params` and of a batch of inputs to a batch of float32 outputs.
    params: tree of arrays, which become constants.
    interface: the input and output of the model. An input of int64 is int32 in the function, as JAX has no other.

  Raises:
    ValueError: the function has a primitive or a loop that has no translation.
  """
  (batch,) = export.symbolic_shape("batch")
  dtype = jnp.int32 if interface.dtype is np.int64 else interface.dtype
  traced = jax.make_jaxpr(function)(params, jax.ShapeDtypeStruct((batch, *interface.shape), dtype))
  graph = Graph(interface, batch)
  given = graph.input if interface.dtype is dtype else graph.cast(graph.input, dtype)
  (result,) = _translate(graph, traced, [*map(constant, jax.tree.leaves(params)), given], "")
  graph.output = graph.whole(result)
  return graph


def _translate(graph: Graph, traced: Any, inputs: Sequence[Tensor], path: str) -> list[Tensor]:
  """Adds the equations of a traced function to the graph, under names that begin with `path`; returns the outputs."""
  jaxpr, constants = getattr(traced, "jaxpr", traced), getattr(traced, "consts", ())
  known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(constant, constants), *inputs), strict=True))

  def find(variable: Any) -> Tensor:
    if isinstance(variable, Literal):
      return constant(np.asarray(variable.val, variable.aval.dtype))
    return known[variable]

  for equation in _needed(jaxpr):
    layers = str(equation.source_info.name_stack).replace("vmap()/", "")  # which Flax's scan adds
    graph.scope = "/".join(filter(None, (path, layers)))
    outputs = _apply(graph, equation, [find(variable) for variable in equation.invars])
    known.update(zip(equation.outvars, outputs, strict=True))
  return [find(variable) for variable in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
  """The equations on which the outputs depend, in order."""
  needed, found = set(map(id, jaxpr.outvars)), []
  for equation in reversed(jaxpr.eqns):
    if needed & set(map(id, equation.outvars)):
      needed |= set(map(id, equation.invars))
      found.append(equation)
  return found[::-1]


def _apply(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
  """The outputs of one equation."""
  name, fields = equation.primitive.name, equation.params
  shapes = [variable.aval.shape for variable in equation.outvars]
  if name == "scan":
    return _scan(graph, fields, shapes, inputs)
  if name in _CALLS:
    return _translate(graph, fields["jaxpr" if "jaxpr" in fields else "call_jaxpr"], inputs, graph.scope)
  if name in _ELEMENTWISE:
    return [_elementwise(graph, equation, inputs)]
  if name in _LAZY:
    return [_LAZY[name](graph, fields, shapes[0], *inputs)]
  inputs = [graph.whole(tensor) for tensor in inputs]
  if all(isinstance(tensor.content, np.ndarray) for tensor in inputs):
    return [constant(_compute(equation, [tensor.content for tensor in inputs]))]
  if name not in _WHOLE:
    raise ValueError(f"ONNX: the primitive {name!r} of JAX has no translation; export to another format")
  return [_WHOLE[name](graph, fields, shapes[0], *inputs)]


def _compute(equation: Any, arrays: Sequence[Any]) -> np.ndarray:
  return np.asarray(equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params))


def _scan(graph: Graph, fields: Fields, shapes: Sequence[Shape], inputs: list[Tensor]) -> list[Tensor]:
  """A loop over the layers of stacked parameters, unrolled; it returns nothing but what it carries."""
  scope, inner = graph.scope, fields["jaxpr"].jaxpr if hasattr(fields["jaxpr"], "jaxpr") else fields["jaxpr"]
  # What is scanned or stacked has one axis more outside than inside; the names of these counts differ between versions
  # of JAX.
  ranks = [len(variable.aval.shape) for variable in inner.invars]
  split = sum(len(tensor.shape) == rank for tensor, rank in zip(inputs, ranks, strict=True))
  if any(len(shape) != len(variable.aval.shape) for shape, variable in zip(shapes, inner.outvars, strict=True)):
    raise ValueError("ONNX: a loop that returns outputs of each step has no translation; export to another format")
  first = split - len(inner.outvars)
  shared, carried, layers = inputs[:first], inputs[first:split], inputs[split:]
  if fields["reverse"] or not all(isinstance(tensor.content, np.ndarray) for tensor in layers):
    raise ValueError("ONNX: only loops over the layers of a tower can be translated; export to another format")
  for index in range(fields["length"]):
    layer = [constant(tensor.content[index]) for tensor in layers]
    carried = _translate(graph, fields["jaxpr"], [*shared, *carried, *layer], f"{scope}/{index}")
  return carried


_CALLS = ("checkpoint", "custom_jvp_call", "custom_vjp_call", "jit", "remat2")  # of traced functions
# Functions of each element, for which shapes are broadcast as in NumPy; those without a name are several operators.
_ELEMENTWISE = {
  "add": "Add",
  "and": "And",
  "div": "Div",
  "eq": "Equal",
  "exp": "Exp",
  "ge": "GreaterOrEqual",
  "le": "LessOrEqual",
  "logistic": "Sigmoid",
  "lt": "Less",
  "max": "Max",
  "mul": "Mul",
  "neg": "Neg",
  "sqrt": "Sqrt",
  "sub": "Sub",
  "tanh": "Tanh",
  "convert_element_type": "Cast",
  "erfc": "",
  "integer_pow": "",
  "ne": "",
  "rsqrt": "",
  "select_n": "",
  "square": "",
}


def _elementwise(graph: Graph, equation: Any, inputs: list[Tensor]) -> Tensor:
  name, shape = equation.primitive.name, equation.outvars[0].aval.shape
  stored = _broadcast([tensor.stored for tensor in inputs])
  if all(isinstance(tensor.content, np.ndarray) for tensor in inputs):
    result = _compute(equation, np.broadcast_arrays(*(tensor.content for tensor in inputs)))
    return Tensor(result, stored, shape)

  def node(operator: str, *arguments: Tensor) -> Tensor:
    return graph.add(operator, arguments, stored, shape)

  match name:
    case "convert_element_type":
      return graph.cast(inputs[0], equation.params["new_dtype"])
    case "erfc":
      return node("Sub", constant(np.float32(1)), node("Erf", *inputs))
    case "ne":
      return node("Not", node("Equal", *inputs))
    case "rsqrt":
      return node("Reciprocal", node("Sqrt", *inputs))
    case "select_n":
      condition, no, yes = inputs
      return node("Where", condition, yes, no)
    case "square":
      return node("Mul", *inputs, *inputs)
    case "integer_pow":
      return node("Pow", *inputs, constant(np.float32(equation.params["y"])))
  return node(_ELEMENTWISE[name], *inputs)


def _broadcast(shapes: Sequence[Shape]) -> Shape:
  rank = max(map(len, shapes))
  padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
  return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _identity(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  del graph, fields, shape
  return x


def _transpose(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  del shape
  return graph.transpose(x, fields["permutation"])


def _broadcast_in_dim(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  axes = [int(axis) for axis in fields["broadcast_dimensions"]]
  stored = dict(zip(axes, x.stored, strict=True))
  stored = tuple(stored.get(axis, 1) for axis in range(len(shape)))
  new = [axis for axis in range(len(shape)) if axis not in axes]
  if not isinstance(x.content, str):
    return Tensor(np.expand_dims(x.content, new), stored, shape)
  return graph.add("Unsqueeze", [x, _integers(new)], stored, shape) if new else Tensor(x.content, stored, shape)


def _squeeze(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  axes = [int(axis) for axis in fields["dimensions"]]
  stored = tuple(size for axis, size in enumerate(x.stored) if axis not in axes)
  if not isinstance(x.content, str):
    return Tensor(x.content.squeeze(tuple(axes)), stored, shape)
  return graph.add("Squeeze", [x, _integers(axes)], stored, shape)


def _tile(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  if any(size != 1 and times != 1 for size, times in zip(x.stored, fields["reps"], strict=True)):
    raise ValueError("ONNX: only dimensions of size 1 can be tiled; export to another format")
  return Tensor(x.content, x.stored, shape)


# Functions of tensors whose repetitions need not exist.
_LAZY = {
  "broadcast_in_dim": _broadcast_in_dim,
  "copy": _identity,
  "squeeze": _squeeze,
  "stop_gradient": _identity,
  "tile": _tile,
  "transpose": _transpose,
}


def _reshape(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  del fields
  return graph.reshape(x, shape)


def _concatenate(graph: Graph, fields: Fields, shape: Shape, *parts: Tensor) -> Tensor:
  return graph.add("Concat", parts, shape, axis=fields["dimension"])


def _slice(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  cut = [axis for axis, (old, new) in enumerate(zip(x.shape, shape, strict=True)) if old is not new and old != new]
  if not cut:
    return x
  starts, stops = ([fields[name][axis] for axis in cut] for name in ("start_indices", "limit_indices"))
  steps = [(fields["strides"] or (1,) * len(shape))[axis] for axis in cut]
  return graph.add("Slice", [x, *map(_integers, (starts, stops, cut, steps))], shape)


def _reduce(operator: str) -> Callable[..., Tensor]:
  def reduce(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
    return graph.add(operator, [x, _integers(fields["axes"])], shape, keepdims=0)

  return reduce


def _argmax(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  (axis,) = fields["axes"]
  numbers = graph.cast(x, np.int32)  # ONNX compares no booleans
  return graph.cast(graph.add("ArgMax", [numbers], shape, axis=int(axis), keepdims=0), fields["index_dtype"])


def _gather(graph: Graph, fields: Fields, shape: Shape, x: Tensor, indices: Tensor) -> Tensor:
  """Lookups of indices in one dimension, of one index in each example of a batch, or of a range that is known."""
  numbers, sizes = fields["dimension_numbers"], fields["slice_sizes"]
  axes, collapsed, batched = numbers.start_index_map, numbers.collapsed_slice_dims, numbers.operand_batching_dims
  whole = all(sizes[axis] == size for axis, size in enumerate(x.shape) if axis not in (*axes, *batched))
  if whole and axes == collapsed == (1,) and batched == (0,):
    return graph.add("GatherND", [x, graph.cast(indices, np.int64)], shape, batch_dims=1)
  if whole and len(axes) == 1 and axes == collapsed and not batched:
    return graph.add("Gather", [x, graph.reshape(indices, indices.shape[:-1])], shape, axis=axes[0])
  if whole and isinstance(indices.content, np.ndarray) and indices.content.ndim == 1 and not (collapsed or batched):
    starts = indices.content.tolist()
    stops = [start + sizes[axis] for axis, start in zip(axes, starts, strict=True)]
    return graph.add("Slice", [x, *map(_integers, (starts, stops, axes))], shape)
  raise ValueError(f"ONNX: a lookup with {numbers} has no translation; export to another format")


def _dot_general(graph: Graph, fields: Fields, shape: Shape, left: Tensor, right: Tensor) -> Tensor:
  """A product of matrices `[*batch, rows, summed] [*batch, summed, columns]`, to which both tensors are brought."""
  (left_summed, right_summed), (left_batch, right_batch) = fields["dimension_numbers"]

  def matrix(x: Tensor, batch: Sequence[int], summed: Sequence[int], *, summed_last: bool) -> Tensor:
    kept = [axis for axis in range(len(x.shape)) if axis not in (*batch, *summed)]
    first, second = (kept, summed) if summed_last else (summed, kept)
    sizes = [[x.shape[axis] for axis in axes] for axes in (batch, first, second)]
    rows = sizes[1] if summed_last and not batch else [math.prod(sizes[1])]  # without a batch, rows may be a grid
    return graph.reshape(graph.transpose(x, [*batch, *first, *second]), (*sizes[0], *rows, math.prod(sizes[2])))

  rows = matrix(left, left_batch, left_summed, summed_last=True)
  columns = matrix(right, right_batch, right_summed, summed_last=False)
  return graph.reshape(graph.add("MatMul", [rows, columns], (*rows.shape[:-1], columns.shape[-1])), shape)


def _convolution(graph: Graph, fields: Fields, shape: Shape, x: Tensor, kernel: Tensor) -> Tensor:
  images, kernels, results = fields["dimension_numbers"]
  if set(fields["lhs_dilation"]) != {1} or fields["batch_group_count"] != 1:
    raise ValueError("ONNX: a transposed convolution has no translation; export to another format")
  inputs = [graph.transpose(x, images), graph.transpose(kernel, kernels)]
  result = graph.add(
    "Conv",
    inputs,
    tuple(shape[axis] for axis in results),
    strides=fields["window_strides"],
    pads=_pads(fields["padding"]),
    dilations=fields["rhs_dilation"],
    group=fields["feature_group_count"],
  )
  return graph.transpose(result, np.argsort(results).tolist())


def _window_sum(graph: Graph, fields: Fields, shape: Shape, x: Tensor) -> Tensor:
  """The sum over windows of height and width, of images `[b h w c]`."""
  (_, *window, _), (_, *strides, _) = fields["window_dimensions"], fields["window_strides"]
  if {*fields["base_dilation"], *fields["window_dilation"]} != {1} or len(window) != 2:
    raise ValueError("ONNX: a sum over windows with dilation has no translation; export to another format")
  pads = _pads(fields["padding"][1:-1])
  first = graph.transpose(x, (0, 3, 1, 2))
  pooled = tuple(shape[axis] for axis in (0, 3, 1, 2))
  mean = graph.add("AveragePool", [first], pooled, kernel_shape=window, strides=strides, pads=pads, count_include_pad=1)
  total = graph.add("Mul", [mean, constant(np.float32(math.prod(window)))], pooled)
  return graph.transpose(total, (0, 2, 3, 1))


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
  """Padding before all dimensions, then after them."""
  return [int(side) for sides in zip(*padding, strict=True) for side in sides]


def _integers(values: Iterable[Any]) -> Tensor:
  return constant(np.array([int(value) for value in values], np.int64))


# Functions of tensors with all their repetitions.
_WHOLE: dict[str, Callable[..., Tensor]] = {
  "argmax": _argmax,
  "concatenate": _concatenate,
  "conv_general_dilated": _convolution,
  "dot_general": _dot_general,
  "gather": _gather,
  "reduce_max": _reduce("ReduceMax"),
  "reduce_sum": _reduce("ReduceSum"),
  "reduce_window_sum": _window_sum,
  "reshape": _reshape,
  "slice": _slice,
}
