"""Graphs of ONNX: nodes and constants, and the file that holds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from declip_jax.extras import onnx

_OPSET, _IR = 18, 8  # of ONNX 1.13 (2022): later runtimes read it
LARGEST_FILE = 2**31 - 2**24  # bytes of weights in one file: protobuf's limit, less 16 MiB for the graph
_SMALL = 1024  # bytes of constants that the graph shares and keeps, such as shapes and axes, which runtimes need there
_ALIGNMENT = 4096  # of weights in a file of their own, which runtimes map into memory
_BATCH = "batch"

Shape = tuple[Any, ...]  # of ints and the symbolic size of the batch


class Tensor(NamedTuple):
  """A constant, or the name of a tensor in the graph; where `stored` has a 1, it is repeated to `shape`."""

  content: np.ndarray | str
  stored: Shape
  shape: Shape


class Interface(NamedTuple):
  """The input and the output of an ONNX model.

  Attributes:
    input, output: their names.
    shape: shape of the input without the batch.
    dtype: dtype of the input; the output is float32.
  """

  input: str
  output: str
  shape: tuple[int, ...]
  dtype: type[np.generic]


def constant(value: Any) -> Tensor:
  """A tensor that is known."""
  array = np.asarray(value)
  return Tensor(array, array.shape, array.shape)


class Graph:
  """A graph in the making; nodes are in the order of their computation.

  Attributes:
    scope: prefix of the names of the next nodes, such as the path of a layer.
    output: whole tensor that the model returns, by default its input.
  """

  def __init__(self, interface: Interface, batch: Any):
    self.scope = ""
    self._interface, self._batch = interface, batch
    self._nodes: list[Any] = []
    self._constants: dict[str, np.ndarray] = {}
    self._small: dict[tuple[bytes, np.dtype, Shape], str] = {}  # names of constants that are used several times
    shape = (batch, *interface.shape)
    self.input = self.output = Tensor(interface.input, shape, shape)

  def add(
    self, operator: str, inputs: Sequence[Tensor], stored: Shape, shape: Shape | None = None, **attributes: Any
  ) -> Tensor:
    """Adds a node of one output; its shape is `stored` unless it is repeated to another one."""
    name = f"{self.scope}/{operator}_{len(self._nodes)}"
    names = [self._name(tensor) for tensor in inputs]
    self._nodes.append(onnx.helper.make_node(operator, names, [name], name, **attributes))
    return Tensor(name, stored, stored if shape is None else shape)

  def whole(self, tensor: Tensor) -> Tensor:
    """The tensor with all its repetitions."""
    content, stored, shape = tensor
    if stored == shape:
      return tensor
    if not isinstance(content, str) and all(isinstance(size, int) for size in shape):
      return constant(np.broadcast_to(content, shape))
    return self.add("Expand", [tensor, self._sizes(shape)], shape)

  def reshape(self, tensor: Tensor, shape: Shape) -> Tensor:
    """The whole tensor in another shape."""
    if tensor.shape == shape:
      return tensor
    tensor = self.whole(tensor)
    if not isinstance(tensor.content, str):
      return constant(tensor.content.reshape(shape))
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
      raise ValueError(f"ONNX: a tensor of shape {shape} has more than one free dimension")
    if sizes[:1] == [-1] and tensor.shape[:1] == shape[:1]:
      sizes[0] = 0  # the same as before
    return self.add("Reshape", [tensor, constant(np.array(sizes, np.int64))], shape)

  def transpose(self, tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor with its dimensions in another order."""
    order = [int(axis) for axis in order]
    if order == sorted(order):
      return tensor
    content, stored, shape = tensor
    stored, shape = (tuple(sizes[axis] for axis in order) for sizes in (stored, shape))
    if not isinstance(content, str):
      return Tensor(content.transpose(order), stored, shape)
    return self.add("Transpose", [tensor], stored, shape, perm=order)

  def cast(self, tensor: Tensor, dtype: Any) -> Tensor:
    """The tensor in another dtype."""
    return self.add("Cast", [tensor], tensor.stored, tensor.shape, to=_onnx_dtype(dtype))

  def save(self, file: Path, facts: Mapping[str, str]) -> None:
    """Writes the model with `facts` as its metadata; weights of more than `LARGEST_FILE` bytes go to `FILE.data`."""
    last = onnx.helper.make_node("Identity", [self._name(self.output)], [self._interface.output])
    weights = {name: array for name, array in self._constants.items() if array.nbytes > _SMALL}
    outside = weights if sum(array.nbytes for array in weights.values()) > LARGEST_FILE else {}
    inside = {name: array for name, array in self._constants.items() if name not in outside}
    tensors = [onnx.numpy_helper.from_array(np.array(array, order="C"), name) for name, array in inside.items()]
    if outside:
      tensors += _write_outside(outside, file.with_name(f"{file.name}.data"))
    given = (self._interface.input, self._interface.dtype, self.input.shape)
    made = (self._interface.output, np.float32, self.output.shape)
    inputs, outputs = ([_value(*described)] for described in (given, made))
    graph = onnx.helper.make_graph([*self._nodes, last], file.stem, inputs, outputs, tensors)
    opset = onnx.helper.make_opsetid("", _OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR, producer_name="declip_jax")
    onnx.helper.set_model_props(model, dict(facts))
    file.write_bytes(model.SerializeToString())

  def _name(self, tensor: Tensor) -> str:
    content = tensor.content
    if isinstance(content, str):
      return content
    key = (content.tobytes(), content.dtype, content.shape) if content.nbytes <= _SMALL else None
    if key in self._small:
      return self._small[key]
    name = f"{self.scope}/constant_{len(self._constants)}"
    self._constants[name] = content
    if key:
      self._small[key] = name
    return name

  def _sizes(self, shape: Shape) -> Tensor:
    """A shape that has the size of the batch as a tensor."""
    free = [size for size in shape if not isinstance(size, int)]
    if any(size != self._batch for size in free):
      raise ValueError(f"ONNX: a tensor of shape {shape} has a free dimension other than the batch")
    batch = self.add("Shape", [self.input], (1,), start=0, end=1)
    parts = [constant(np.array([size], np.int64)) if isinstance(size, int) else batch for size in shape]
    return self.add("Concat", parts, (len(shape),), axis=0)


def _value(name: str, dtype: Any, shape: Shape) -> Any:
  sizes = [size if isinstance(size, int) else _BATCH for size in shape]
  return onnx.helper.make_tensor_value_info(name, _onnx_dtype(dtype), sizes)


def _onnx_dtype(dtype: Any) -> int:
  return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _write_outside(constants: Mapping[str, np.ndarray], file: Path) -> list[Any]:
  """Writes constants to a file, and returns references to them."""
  tensors = []
  with file.open("wb") as out:
    for name, array in constants.items():
      out.write(bytes(-out.tell() % _ALIGNMENT))
      tensor = onnx.TensorProto(name=name, data_type=_onnx_dtype(array.dtype), dims=array.shape)
      tensor.data_location = onnx.TensorProto.EXTERNAL
      for key, value in (("location", file.name), ("offset", out.tell()), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
      out.write(np.ascontiguousarray(array).data)
      tensors.append(tensor)
  return tensors
