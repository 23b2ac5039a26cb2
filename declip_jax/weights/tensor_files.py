"""Reads tensors from the checkpoint files of other projects, without PyTorch and without executing their pickles.

| file | recognised by | kind |
|---|---|---|
| safetensors | a JSON header | "safetensors" |
| `torch.save` since PyTorch 1.6 | a zip with `*/data.pkl` | "torch" |
| `torch.save` before 1.6 | a pickled magic number | "torch" |
| `torch.jit.save`, such as OpenAI's release of CLIP | a zip with `*/constants.pkl` and `*/code/` | "torchscript" |

The last three contain a pickle, a program for a stack machine that can call any function. Here the machine supports
only the instructions for plain data and only the names in `_NAMES`, each of which makes a number, a container or a
description of a tensor. It is Python's own `pickle._Unpickler`, not the compiled `pickle.Unpickler`, whose instructions
cannot be restricted and some of which allocate as much memory as the file asks for.

Formats: torch/serialization.py, torch/csrc/jit/serialization/pickler.cpp and caffe2/serialize/inline_container.h of
PyTorch 2; https://github.com/huggingface/safetensors#format.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
import io
import math
import os
import pickle
import re
import struct
from typing import Any, BinaryIO, NamedTuple, NoReturn
import zipfile

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the format before PyTorch 1.6
_PLACES = ("state_dict", "model")  # keys of the state dict in checkpoints of open_clip and SLIP, and of DeCLIP
_LONGEST_NAME = 500  # characters of a tensor's name in TorchScript, where a module may contain itself
_MOST_NAMES = 200_000  # in TorchScript, where a few modules that contain each other could have billions
_MOST_AXES = 16
_DAMAGE = (
  ArithmeticError,
  AttributeError,
  EOFError,
  LookupError,
  MemoryError,
  RuntimeError,
  SafetensorError,
  TypeError,
  UnicodeError,
  pickle.UnpicklingError,
  struct.error,
  zipfile.BadZipFile,
)


@dataclass(eq=False)
class Opaque:
  """Inert placeholder for an object of another class, such as argparse.Namespace or a TorchScript module.

  Attributes:
    name: qualified name of the class.
    state: attributes of the object.
  """

  name: str
  state: dict[str, Any] = field(default_factory=dict)


class TensorFile(NamedTuple):
  """Contents of a file, see `read_tensors`.

  Attributes:
    tensors: read-only arrays by their names in the state dict; some share memory or are not contiguous.
    kind: "torchscript", "torch" or "safetensors".
    extras: strings, numbers, booleans and Nones next to the state dict; the metadata of a safetensors file.
  """

  tensors: dict[str, np.ndarray]
  kind: str
  extras: dict[str, Any]


class _Storage(NamedTuple):
  """The memory of a tensor: `size` elements."""

  dtype: np.dtype
  key: str
  size: int


class _Tensor(NamedTuple):
  """A tensor before it is read and checked; offset and stride are numbers of elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]


_Reader = Callable[[_Storage], bytes]


def read_tensors(path: str | os.PathLike[str]) -> TensorFile:
  """Reads the state dict of a file; other tensors, such as an optimizer's, are not loaded.

  The state dict is the whole file or, in a training checkpoint, the entry "state_dict" or "model"; open_clip's
  "state_dict_ema" is not read. A TorchScript module's state dict has all attributes that are tensors. Element types are
  kept, bfloat16 as that of ml_dtypes.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged, of another format, without tensors, or asks for a name other than those of plain
      data; the message begins with the path.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    raise ValueError(f"{path}: this is a folder, expected a file")
  try:
    with open(path, "rb") as file:
      start = file.read(512)
      file.seek(0)
      if start.startswith(b"PK\3\4"):
        return _read_zip(file)
      if start[4:9] == b"\0\0\0\0{":  # the length of the JSON, 8 bytes; first, as 640 looks like the start of a pickle
        return _read_safetensors(path)
      if start.startswith(b"\x80"):
        return _read_legacy(file)
      raise ValueError(_describe(start))
  except _DAMAGE as error:
    raise ValueError(f"{path}: damaged, truncated or not a checkpoint ({type(error).__name__}: {error})") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _describe(start: bytes) -> str:
  """A description of a file in a wrong format."""
  if not start:
    return "empty, 0 bytes"
  if start[257:262] == b"ustar":
    return "a tar archive: unpack it and pass one of its files"
  kind = "text" if re.fullmatch(rb"[\t\n\r -~\x80-\xff]+", start) else "neither a PyTorch nor a safetensors file"
  hint = "; is it an error page or a Git LFS pointer?" if kind == "text" else ""
  return f"{kind}; it begins with {start[:40]!r}{hint}"


def _read_safetensors(path: str) -> TensorFile:
  tensors = {}
  with safe_open(path, "numpy") as file:
    extras = file.metadata() or {}
    for name in file.keys():  # noqa: SIM118
      try:
        tensors[name] = file.get_tensor(name)  # bfloat16 too: ml_dtypes makes its name known to NumPy
      except (AttributeError, TypeError):
        raise ValueError(
          f"tensor {name} has type {file.get_slice(name).get_dtype()}, which NumPy does not have"
        ) from None
      tensors[name].flags.writeable = False
  if not tensors:
    raise ValueError("no tensors")
  return TensorFile(tensors, "safetensors", extras)


def _read_zip(file: BinaryIO) -> TensorFile:
  archive = zipfile.ZipFile(file)
  entries = {entry.filename: entry for entry in archive.infolist()}
  if len(entries) < len(archive.infolist()):
    raise ValueError("damaged: two entries of the zip have the same name")
  if sum(entry.compress_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
    raise ValueError("damaged: entries of the zip overlap")
  roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
  if len(roots) != 1:
    raise ValueError(f"a zip with {len(roots)} entries FOLDER/data.pkl, expected 1; its entries are {_listed(entries)}")
  (root,) = roots

  def read_entry(name: str) -> bytes:
    if name not in entries or entries[name].header_offset < 0:
      raise ValueError(f"damaged: the zip has no {_shown(name)}")
    if entries[name].compress_type != zipfile.ZIP_STORED:  # not what PyTorch writes, and unpacked it may be huge
      raise ValueError(f"{_shown(name)} is compressed in the zip, expected an uncompressed entry")
    return archive.read(name)

  @cache
  def read_storage(storage: _Storage) -> bytes:
    name = f"{root}data/{storage.key}"
    data = read_entry(name)
    if len(data) != storage.size * storage.dtype.itemsize:
      raise ValueError(f"{_shown(name)} has {len(data)} bytes, expected {storage.size * storage.dtype.itemsize}")
    return data

  if root + "byteorder" in entries and (order := read_entry(root + "byteorder")) != b"little":
    raise ValueError(f"byte order {order[:20]!r} is not supported, only b'little'")
  is_script = root + "constants.pkl" in entries and any(name.startswith(root + "code/") for name in entries)
  content = _Unpickler(io.BytesIO(read_entry(root + "data.pkl"))).load()
  return _collect(content, is_script, read_storage)


def _read_legacy(file: BinaryIO) -> TensorFile:
  """Five pickles (magic number, protocol, system, object, storage keys); then per key an int64 size and the data."""
  magic = _Unpickler(file).load()
  if magic != _MAGIC:
    raise ValueError("a pickle that torch.save did not write")
  protocol, system = _Unpickler(file).load(), _Unpickler(file).load()
  if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
    raise ValueError(f"damaged or not supported: expected protocol {_PROTOCOL}, little-endian")
  unpickler = _Unpickler(file)
  content, keys = unpickler.load(), _Unpickler(file).load()
  end = os.fstat(file.fileno()).st_size
  starts = {}
  for key in keys:
    if not isinstance(key, str) or key not in unpickler.storages:
      raise ValueError(f"damaged: no tensor uses storage {_shown(key)}")
    storage = unpickler.storages[key]
    size = int.from_bytes(file.read(8), "little", signed=True)
    starts[key] = file.tell()
    stop = starts[key] + storage.size * storage.dtype.itemsize
    if size != storage.size or stop > end:
      raise ValueError(
        f"damaged or truncated: storage {_shown(key)} should have {storage.size} elements up to byte {stop}"
      )
    file.seek(stop)

  @cache
  def read_storage(storage: _Storage) -> bytes:
    if storage.key not in starts:
      raise ValueError(f"damaged: no storage {_shown(storage.key)}")
    file.seek(starts[storage.key])
    return file.read(storage.size * storage.dtype.itemsize)

  return _collect(content, False, read_storage)


def _collect(content: Any, is_script: bool, read: _Reader) -> TensorFile:
  """Finds the state dict in the content of a pickle and reads its tensors."""
  if isinstance(content, Opaque) and content.name.startswith("__torch__."):
    is_script = True
    state, beside = _flatten(content), content.state
  elif isinstance(content, dict):
    places = [content[name] for name in _PLACES if isinstance(content.get(name), dict)]
    state, beside = next((place for place in places if _tensors_of(place)), content), content
  else:
    name = content.name if isinstance(content, Opaque) else type(content).__name__.strip("_")
    raise ValueError(f"not a state dict but an object of type {name}")
  tensors = _tensors_of(state)
  if not tensors:
    where = "at the top or under " + " or ".join(map(repr, _PLACES))
    raise ValueError(f"no tensors {where}; its entries are {_listed(beside)}")
  extras = {name: value for name, value in beside.items() if isinstance(name, str) and _is_plain(value)}
  arrays = {name: _array(name, tensor, read) for name, tensor in tensors.items()}
  return TensorFile(arrays, "torchscript" if is_script else "torch", extras)


def _tensors_of(state: dict[Any, Any]) -> dict[str, _Tensor]:
  return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _is_plain(value: Any) -> bool:
  return value is None or isinstance(value, str | int | float)


def _listed(names: Iterable[Any]) -> str:
  """The first of the names, shortened: names in a file can be long, or objects that contain themselves."""
  names = list(names)
  shown = ", ".join(map(_shown, names[:20]))
  return (shown or "nothing") + (f" ... ({len(names)})" if len(names) > 20 else "")


def _shown(name: Any) -> str:
  return ascii(name[:80])[1:-1] if isinstance(name, str) else f"an object of type {type(name).__name__}"


def _flatten(module: Opaque) -> dict[str, _Tensor]:
  """Tensors of a TorchScript module and its submodules, by names such as `visual.conv1.weight`."""
  tensors = {}
  pending, seen = [("", module)], 0
  while pending:
    name, value = pending.pop()
    seen += 1
    if isinstance(value, Opaque):
      attributes = [key for key in value.state if isinstance(key, str)]
      pending += [(f"{name}.{key}" if name else key, value.state[key]) for key in reversed(attributes)]
    elif isinstance(value, _Tensor) and name in tensors:
      raise ValueError(f"two tensors have the name {_shown(name)}")
    elif isinstance(value, _Tensor):
      tensors[name] = value
    if seen + len(pending) > _MOST_NAMES or len(name) > _LONGEST_NAME:
      raise ValueError(f"its modules are nested too deeply, as in {_shown(name)}")
  return tensors


def _array(name: str, tensor: _Tensor, read: _Reader) -> np.ndarray:
  """A view of the storage; no two elements may share memory, so that few bytes cannot become a huge array.

  Raises:
    ValueError: the tensor exceeds its storage, or is not a permutation of the axes of a contiguous one.
  """
  storage, offset, shape, stride = tensor
  numbers = (offset, *shape, *stride)
  if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(shape) != len(stride):
    raise ValueError(f"tensor {_shown(name)}: bad offset, shape or stride")
  if len(shape) > _MOST_AXES:
    raise ValueError(f"tensor {_shown(name)}: {len(shape)} axes, at most {_MOST_AXES} are supported")
  size = math.prod(shape)
  order = sorted(range(len(shape)), key=lambda axis: -stride[axis])  # of the axes in memory
  step = 1
  for axis in reversed(order):
    if shape[axis] > 1 and stride[axis] != step and size:
      raise ValueError(
        f"tensor {_shown(name)}: shape {shape} with stride {stride} has gaps or overlaps, which is not supported"
      )
    step *= shape[axis] if shape[axis] > 1 else 1
  if offset + size > storage.size:
    raise ValueError(f"tensor {_shown(name)}: shape {shape} at {offset} exceeds its storage of {storage.size} elements")
  if size:
    flat = np.frombuffer(read(storage), storage.dtype, size, offset * storage.dtype.itemsize)
  else:
    flat = np.empty(0, storage.dtype)
  array = flat.reshape([shape[axis] for axis in order]).transpose(sorted(range(len(shape)), key=order.__getitem__))
  array.flags.writeable = False
  return array


# The names that a pickle may ask for, and the functions that replace them. Their arguments are from the file, and none
# copies them: a few bytes that name one big list a thousand times must stay a few bytes.


def _make_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
  if not (isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)):
    raise ValueError("damaged: a tensor without storage, shape or stride")
  return _Tensor(storage, offset, shape, stride)


def _make_dict() -> dict[Any, Any]:
  return {}


def _keep(value: Any, *_: Any) -> Any:
  return value


def _make_dtype(code: Any, *_: Any) -> np.dtype:
  if not (isinstance(code, str) and re.fullmatch("[biuf][1248]", code)):
    raise ValueError(f"a NumPy value of type {_shown(code)} is not supported, only numbers")
  return np.dtype(code)


def _make_scalar(dtype: Any, data: Any) -> Any:
  if not (isinstance(dtype, np.dtype) and isinstance(data, bytes) and len(data) == dtype.itemsize):
    raise ValueError("damaged: a NumPy value without type or data")
  return np.frombuffer(data, dtype)[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
  """Bytes of a NumPy number, which old pickles store as text."""
  if not (isinstance(text, str) and len(text) <= 16 and encoding == "latin1"):
    raise ValueError("damaged: the bytes of a NumPy value are not a short latin1 text")
  return text.encode("latin1")


_STORAGES = {
  "BFloat16": np.dtype(ml_dtypes.bfloat16),
  "Bool": np.dtype("?"),
  "Byte": np.dtype("u1"),
  "Char": np.dtype("i1"),
  "Double": np.dtype("<f8"),
  "Float": np.dtype("<f4"),
  "Half": np.dtype("<f2"),
  "Int": np.dtype("<i4"),
  "Long": np.dtype("<i8"),
  "Short": np.dtype("<i2"),
}
_ELEMENT_TYPES = ["bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8"]
_OPAQUE = ("argparse.Namespace", "torch.device")
_NAMES = {
  "_codecs.encode": _encode,
  "collections.Counter": _keep,  # of a dict; the step schedules of PyTorch have one
  "collections.OrderedDict": _make_dict,
  "numpy._core.multiarray.scalar": _make_scalar,
  "numpy.core.multiarray.scalar": _make_scalar,
  "numpy.dtype": _make_dtype,
  "torch.Size": _keep,
  "torch._utils._rebuild_parameter": _keep,
  "torch._utils._rebuild_parameter_with_state": _keep,
  "torch._utils._rebuild_tensor": _make_tensor,
  "torch._utils._rebuild_tensor_v2": _make_tensor,
  "torch.jit._pickle.build_boollist": _keep,
  "torch.jit._pickle.build_doublelist": _keep,
  "torch.jit._pickle.build_intlist": _keep,
  "torch.jit._pickle.build_tensorlist": _keep,
  "torch.jit._pickle.restore_type_tag": _keep,  # of a list or dict, which is its first argument
  **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
  **{f"torch.{name}": f"torch.{name}" for name in _ELEMENT_TYPES},
}


class _Instructions(dict[int, Callable[["_Unpickler"], None]]):
  """From each byte of a pickle to its instruction."""

  def __missing__(self, code: int) -> NoReturn:
    raise ValueError(f"damaged, or not only plain data: it has the pickle instruction {code:#x}")


class _Unpickler(pickle._Unpickler):
  """Reads plain data and `_Tensor`s; `storages` has every storage that they name."""

  def __init__(self, file: BinaryIO):
    super().__init__(file, encoding="utf-8")
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    full_name = f"{module}.{name}"
    if full_name in _OPAQUE or full_name.startswith("__torch__."):
      return lambda *_: Opaque(full_name)
    if full_name not in _NAMES:
      raise ValueError(f"its pickle asks for {_shown(full_name)}; only tensors and plain containers are supported")
    return _NAMES[full_name]

  def persistent_load(self, pid: Any) -> _Storage:
    match pid:
      case ("storage", np.dtype() as dtype, str() as key, str(), int() as size, *view) if size >= 0 and not any(view):
        storage = _Storage(dtype, key, size)
        if self.storages.setdefault(key, storage) == storage:
          return storage
    raise ValueError("damaged, or written before PyTorch 0.4: a storage is not described as expected")

  def _call(self) -> None:
    arguments, function = self.stack.pop(), self.stack[-1]
    if not callable(function) or not isinstance(arguments, tuple):  # callable is only what find_class gave
      raise ValueError(f"damaged: {_shown(function)} is called with {_shown(arguments)}")
    self.stack[-1] = function(*arguments)

  def _set_state(self) -> None:
    state, target = self.stack.pop(), self.stack[-1]
    if isinstance(target, Opaque) and isinstance(state, dict):
      target.state = state
    elif isinstance(target, np.dtype) and isinstance(state, tuple) and state[1] not in ("<", "|"):
      raise ValueError(f"a NumPy value of byte order {_shown(state[1])} is not supported, only little-endian")
    elif not isinstance(target, dict | np.dtype):  # a state dict has its versions as a state, which are not needed
      raise ValueError(f"damaged: {_shown(target)} is given a state")

  def _set_items(self) -> None:
    self._add_items(self.pop_mark())

  def _set_item(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self._add_items([key, value])

  def _add_items(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
      raise ValueError(f"damaged: {_shown(target)} is filled like a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not _is_plain(key):  # to hash a tuple within a million tuples ends Python
        raise ValueError(f"a dict with {_shown(key)} as a key is not supported, only strings and numbers")
      if key in target:
        raise ValueError(f"the name {_shown(key)} occurs twice")
      target[key] = value

  _PLAIN = """
    APPEND APPENDS BINBYTES BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINSTRING BINUNICODE EMPTY_DICT
    EMPTY_LIST EMPTY_TUPLE FRAME GLOBAL LONG1 LONG4 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE POP PROTO
    SHORT_BINBYTES SHORT_BINSTRING SHORT_BINUNICODE STACK_GLOBAL STOP TUPLE TUPLE1 TUPLE2 TUPLE3
  """
  dispatch = _Instructions(
    {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _PLAIN.split())}
  )
  dispatch[pickle.BUILD[0]] = _set_state
  dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]] = _call
  dispatch[pickle.SETITEM[0]] = _set_item
  dispatch[pickle.SETITEMS[0]] = _set_items
