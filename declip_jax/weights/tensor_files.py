"""Reads tensors from the checkpoint files of other projects, without PyTorch and without executing their pickles.

| file | recognised by | kind |
|---|---|---|
| safetensors | a JSON header | "safetensors" |
| `torch.save` since PyTorch 1.6 | a zip with `*/data.pkl` | "torch" |
| `torch.save` before 1.6 | a pickled magic number | "torch" |
| `torch.jit.save`, such as OpenAI's release of CLIP | a zip with `*/constants.pkl` and `*/code/` | "torchscript" |
| `numpy.savez`, as big_vision writes it | a zip with only `*.npy` | "npz" |
| `flax.serialization.to_bytes`, such as `flax_model.msgpack` of transformers | MessagePack of a map | "msgpack" |
| several of these files and their index | a name that ends with `.index.json` | that of the files |

Those of PyTorch contain a pickle, which `data.storage.unpickler` reads: `_NAMES` makes numbers, containers and
descriptions of tensors, and everything else becomes an inert placeholder.

Formats: torch/serialization.py, torch/csrc/jit/serialization/pickler.cpp and caffe2/serialize/inline_container.h of
PyTorch 2; https://github.com/huggingface/safetensors#format.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
import io
import json
import math
import os
import re
from typing import Any, BinaryIO, NamedTuple
import zipfile

import flax.serialization
import ml_dtypes
import numpy as np

from declip_jax.data.storage.unpickler import DAMAGE, Opaque, Unpickler, is_plain, shown

INDEX = ".index.json"  # end of the name of a JSON file that names the file of each tensor, as transformers writes it
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the format before PyTorch 1.6
# Keys of the state dict in checkpoints: those of open_clip, SLIP and Lightning; of DeCLIP; of PyTorch's tutorial; of
# DeepSpeed; and other common ones.
_PLACES = ("state_dict", "model", "model_state_dict", "module", "net", "network", "params", "weights")
_DEEPEST_PLACE = 3  # dicts around the state dict
_LONGEST_NAME = 500  # characters of a tensor's name in TorchScript, where a module may contain itself
_MOST_NAMES = 200_000  # in TorchScript, where a few modules that contain each other could have billions
_MOST_AXES = 16
_MOST_SHOWN = 140  # characters of names in a message
_LONGEST_HEADER = 8 << 20  # bytes of the JSON of a safetensors file or an index, which takes up to 30 times the memory
_MOST_FILES = 1000  # of an index
_MOST_EXPANSION, _SMALL = 4, 1 << 20  # bytes of all tensors by those of the file; tensors may share memory
_MESSAGE_PACK = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", re.DOTALL)  # a map of strings
_DAMAGE = (*DAMAGE, zipfile.BadZipFile)


class TensorFile(NamedTuple):
  """Contents of a file, see `read_tensors`.

  Attributes:
    tensors: read-only arrays by their names in the state dict; some share memory or are not contiguous.
    kind: "torchscript", "torch", "safetensors", "npz" or "msgpack".
    extras: strings, numbers, booleans and Nones next to the state dict; the metadata of a safetensors file.
    left_out: keys of other state dicts in the file, such as a moving average, which were not read.
  """

  tensors: dict[str, np.ndarray]
  kind: str
  extras: dict[str, Any]
  left_out: tuple[str, ...] = ()


class _Storage(NamedTuple):
  """The memory of a tensor: `size` elements."""

  dtype: np.dtype
  key: str
  size: int


class _Tensor(NamedTuple):
  """A tensor before it is read and checked; offset and stride are numbers of elements, `bits` such as "neg"."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]
  bits: tuple[str, ...] = ()


@dataclass(eq=False)
class _NumpyType(Opaque):
  """The element type of a NumPy number, such as "f8"."""

  code: str = ""


_Reader = Callable[[_Storage], bytes]


def read_tensors(path: str | os.PathLike[str]) -> TensorFile:
  """Reads the state dict of a file, or of the files of an index; other tensors, as of an optimizer, are not loaded.

  The state dict is the whole file or, in a training checkpoint, an entry such as "state_dict" or "model". A moving
  average of the weights, such as open_clip's "state_dict_ema", is read only if there is nothing else. A TorchScript
  module's state dict has all attributes that are tensors. Element types are kept, bfloat16 as that of ml_dtypes.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged, of another format, without tensors, with several state dicts, asks for a name that
      only an attack asks for, or is an index of files outside its folder; the message begins with the path.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    raise ValueError(f"{path}: this is a folder, expected a file")
  try:
    if path.endswith(INDEX):
      return _read_indexed(path)
    with open(path, "rb") as file:
      start = file.read(512)
      file.seek(0)
      if start.startswith(b"PK\3\4"):
        return _read_zip(file)
      if start[4:9] == b"\0\0\0\0{":  # the length of the JSON, 8 bytes; first, as 640 looks like the start of a pickle
        return _read_safetensors(file)
      if start.startswith(b"\x80"):
        return _read_legacy(file)
      if _MESSAGE_PACK.match(start):
        return _read_message_pack(file)
      raise ValueError(_describe(start))
  except _DAMAGE as error:
    cause = f"{type(error).__name__}: {' '.join(str(error).split()):.150}"
    raise ValueError(f"{path}: damaged, truncated or not a checkpoint ({cause})") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _read_indexed(path: str) -> TensorFile:
  """The tensors of the files in an index, each of which has those that the index says, and no others."""
  if (size := os.path.getsize(path)) > _LONGEST_HEADER:
    raise ValueError(f"an index of {size} bytes, expected at most {_LONGEST_HEADER}")
  with open(path, "rb") as file:
    try:
      content = json.loads(file.read(), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise ValueError(f"an index that is not JSON: {error}") from error
  files = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(files, dict) or not files:
    raise ValueError("an index without weight_map, expected an object of file names by the names of tensors")
  for name in files.values():
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):
      raise ValueError(
        f"the index names the file {shown(name)}, expected a .safetensors or .bin file in its own folder"
      )
  names = sorted(set(files.values()))
  if len(names) > _MOST_FILES:
    raise ValueError(f"an index of {len(names)} files, expected at most {_MOST_FILES}")
  tensors, kind = {}, ""
  for name in names:
    shard = os.path.join(os.path.dirname(path), name)
    if not os.path.isfile(shard):
      raise ValueError(f"the index names the file {shown(name)}, which does not exist")
    found = read_tensors(shard)
    if wrong := found.tensors.keys() ^ {tensor for tensor, file in files.items() if file == name}:
      raise ValueError(f"the tensors of {shown(name)} differ from those in the index: {listed(sorted(wrong))}")
    tensors, kind = tensors | found.tensors, found.kind
  return TensorFile(tensors, kind, {})


def _describe(start: bytes) -> str:
  """A description of a file in a wrong format."""
  if not start:
    return "empty, 0 bytes"
  if start[257:262] == b"ustar":
    return "a tar archive: unpack it and pass one of its files"
  if start.startswith(b"\x89HDF"):
    return "an HDF5 file, as of TensorFlow, expected a PyTorch or a safetensors file"
  kind = "text" if re.fullmatch(rb"[\t\n\r -~\x80-\xff]+", start) else "neither a PyTorch nor a safetensors file"
  hint = "; is it an error page or a Git LFS pointer?" if kind == "text" else ""
  return f"{kind}; it begins with {start[:40]!r}{hint}"


_ELEMENT_TYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "BOOL": np.dtype("?"),
  **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
  **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
  **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
}


def _read_safetensors(file: BinaryIO) -> TensorFile:
  """A JSON header of names, element types, shapes and places, and the data, without gaps."""
  size = os.fstat(file.fileno()).st_size
  length = int.from_bytes(file.read(8), "little")
  if length > min(size - 8, _LONGEST_HEADER):
    raise ValueError(f"damaged or truncated: a header of {length} bytes in a file of {size}, at most {_LONGEST_HEADER}")
  try:
    header = json.loads(file.read(length), object_pairs_hook=_unique)
  except json.JSONDecodeError as error:
    raise ValueError(f"damaged: its header is not JSON: {error}") from error
  extras = header.pop("__metadata__", {})
  if not isinstance(extras, dict) or not all(map(is_plain, extras.values())):
    raise ValueError("damaged: __metadata__ is not an object of texts")
  entries = {name: _entry(name, about) for name, about in header.items()}
  end = 0
  for name, (_, _, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
    if start != end:
      raise ValueError(f"damaged: the data of tensor {shown(name)} starts at byte {start}, expected {end}")
    end = stop
  if end != size - 8 - length:
    raise ValueError(f"damaged or truncated: the data has {size - 8 - length} bytes, expected {end}")
  tensors = {}
  for name, (kind, shape, start, stop) in entries.items():
    if kind not in _ELEMENT_TYPES:
      raise ValueError(f"tensor {shown(name)} has type {shown(kind)}, expected one of {', '.join(_ELEMENT_TYPES)}")
    if math.prod(shape) * _ELEMENT_TYPES[kind].itemsize != stop - start:
      raise ValueError(f"damaged: tensor {shown(name)} of type {kind} and shape {shape} has {stop - start} bytes")
    file.seek(8 + length + start)
    tensors[name] = np.frombuffer(file.read(stop - start), _ELEMENT_TYPES[kind]).reshape(shape)
  if not tensors:
    raise ValueError("no tensors")
  return TensorFile(tensors, "safetensors", extras)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object, after a check that no name occurs twice: readers differ in which of the two they use."""
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise ValueError(f"the name {shown(twice)} occurs twice")
  return found


def _entry(name: str, about: Any) -> tuple[str, list[int], int, int]:
  """Element type, shape, start and stop of a tensor of a safetensors file."""
  match about:
    case {"dtype": str() as kind, "shape": list() as shape, "data_offsets": [start, stop]} if len(about) == 3:
      if all(type(number) is int and number >= 0 for number in (*shape, start, stop)) and start <= stop:
        return kind, shape, start, stop
  raise ValueError(f"damaged: the header does not describe tensor {shown(name)} as expected")


def _read_zip(file: BinaryIO) -> TensorFile:
  archive = zipfile.ZipFile(file)
  entries = {entry.filename: entry for entry in archive.infolist()}
  if len(entries) < len(archive.infolist()):
    raise ValueError("damaged: two entries of the zip have the same name")
  if sum(entry.compress_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
    raise ValueError("damaged: entries of the zip overlap")
  roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
  if entries and all(name.endswith(".npy") for name in entries):
    return _read_arrays(archive, entries)
  if len(roots) != 1:
    raise ValueError(f"a zip with {len(roots)} entries FOLDER/data.pkl, expected 1; its entries are {listed(entries)}")
  (root,) = roots

  @cache
  def read_storage(storage: _Storage) -> bytes:
    name, expected = f"{root}data/{storage.key}", storage.size * storage.dtype.itemsize
    if name in entries and entries[name].file_size != expected:
      raise ValueError(f"{shown(name)} has {entries[name].file_size} bytes, expected {expected}")
    return _stored(archive, entries, name)

  if root + "byteorder" in entries and (order := _stored(archive, entries, root + "byteorder")) != b"little":
    raise ValueError(f"byte order {order[:20]!r} is not supported, only b'little'")
  is_script = root + "constants.pkl" in entries and any(name.startswith(root + "code/") for name in entries)
  content = _TorchUnpickler(io.BytesIO(_stored(archive, entries, root + "data.pkl"))).load()
  return _collect(content, is_script, read_storage, os.fstat(file.fileno()).st_size)


def _stored(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], name: str) -> bytes:
  """The contents of an uncompressed entry of a zip."""
  if name not in entries or entries[name].header_offset < 0:
    raise ValueError(f"damaged: the zip has no {shown(name)}")
  if entries[name].compress_type != zipfile.ZIP_STORED:  # PyTorch and NumPy write none by default; it may be huge
    raise ValueError(f"{shown(name)} is compressed in the zip, expected an uncompressed entry")
  return archive.read(name)


def _read_arrays(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> TensorFile:
  """The arrays of a NumPy archive: those under "params/", without it, or all; NumPy has bfloat16 as 2 bytes each."""
  names = [name for name in entries if name.startswith("params/")] or list(entries)
  tensors = {}
  for name in names:
    contents = io.BytesIO(_stored(archive, entries, name))
    try:
      array = np.lib.format.read_array(contents, allow_pickle=False)
    except Exception as error:  # the header is parsed as Python, which may raise anything
      cause = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
      raise ValueError(f"damaged: {shown(name)} is not an array ({cause})") from error
    is_half = array.dtype.kind == "V" and array.dtype.itemsize == 2
    tensors[name.removeprefix("params/").removesuffix(".npy")] = array.view(ml_dtypes.bfloat16) if is_half else array
  return TensorFile(tensors, "npz", {})


def _read_message_pack(file: BinaryIO) -> TensorFile:
  """Arrays and scalars by their paths in nested maps, such as "text_model/encoder/layers/0/mlp/fc1/kernel"."""
  try:
    content = flax.serialization.msgpack_restore(file.read())
  except Exception as error:  # of the unpacker or of NumPy, at any field of the file
    cause = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
    raise ValueError(f"damaged, or not MessagePack as Flax writes it ({cause})") from error
  tensors: dict[str, np.ndarray] = {}
  pending = [("", content)]
  while pending:
    path, value = pending.pop()
    if isinstance(value, dict):
      pending += [(f"{path}/{name}".lstrip("/"), inner) for name, inner in value.items()]
    elif isinstance(value, (np.ndarray, np.generic)):
      if path in tensors:
        raise ValueError(f"the path {shown(path)} occurs twice")
      tensors[path] = np.asarray(value)
  if not tensors:
    raise ValueError("no tensors")
  return TensorFile(tensors, "msgpack", {})


def _read_legacy(file: BinaryIO) -> TensorFile:
  """Five pickles (magic number, protocol, system, object, storage keys); then per key an int64 size and the data."""
  magic = _TorchUnpickler(file).load()
  if magic != _MAGIC:
    raise ValueError("a pickle that torch.save did not write")
  protocol, system = _TorchUnpickler(file).load(), _TorchUnpickler(file).load()
  if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
    raise ValueError(f"damaged or not supported: expected protocol {_PROTOCOL}, little-endian")
  unpickler = _TorchUnpickler(file)
  content, keys = unpickler.load(), _TorchUnpickler(file).load()
  end = os.fstat(file.fileno()).st_size
  starts = {}
  for key in keys:
    if not isinstance(key, str) or key not in unpickler.storages:
      raise ValueError(f"damaged: no tensor uses storage {shown(key)}")
    storage = unpickler.storages[key]
    size = int.from_bytes(file.read(8), "little", signed=True)
    starts[key] = file.tell()
    stop = starts[key] + storage.size * storage.dtype.itemsize
    if size != storage.size or stop > end:
      raise ValueError(
        f"damaged or truncated: storage {shown(key)} should have {storage.size} elements up to byte {stop}"
      )
    file.seek(stop)

  @cache
  def read_storage(storage: _Storage) -> bytes:
    if storage.key not in starts:
      raise ValueError(f"damaged: no storage {shown(storage.key)}")
    file.seek(starts[storage.key])
    return file.read(storage.size * storage.dtype.itemsize)

  return _collect(content, False, read_storage, end)


def _collect(content: Any, is_script: bool, read: _Reader, file_size: int) -> TensorFile:
  """Finds the state dict in the content of a pickle and reads its tensors."""
  if isinstance(content, Opaque) and content.name.startswith("__torch__.") and isinstance(content.state, dict):
    is_script = True
    state, others, left_out = _flatten(content), content.state, ()
  elif isinstance(content, dict):
    state, left_out = _find_state(content)
    others = content
  else:
    name = shown(content.name) if isinstance(content, Opaque) else type(content).__name__.strip("_")
    raise ValueError(f"not a state dict but an object of type {name}: save its state_dict()")
  tensors = _tensors_of(state)
  if not tensors:
    raise ValueError(f"no tensors at the top or in a dict under 'state_dict' or 'model'; it has {listed(others)}")
  for name, value in state.items():
    if isinstance(value, Opaque) and value.name.startswith("torch._utils._rebuild_"):
      raise ValueError(f"tensor {shown(name)} is made by {shown(value.name)}, which is not supported")
  extras = {name: value for name, value in others.items() if isinstance(name, str) and is_plain(value)}
  arrays, left = {}, _MOST_EXPANSION * file_size + _SMALL
  for name, tensor in tensors.items():
    arrays[name] = _array(name, tensor, read, left)
    left -= arrays[name].nbytes
  return TensorFile(arrays, "torchscript" if is_script else "torch", extras, left_out)


def _find_state(content: dict[Any, Any]) -> tuple[dict[Any, Any], tuple[str, ...]]:
  """The state dict, and the keys of others: that of a usual key, or else the dict with the most tensors.

  That may be the content itself.
  """
  inner = {str(name): _tensors_within(value) for name, value in content.items()}
  others = {name: state for name, state in inner.items() if state and not re.search("(?i)optim", name)}
  if usual := next((name for name in _PLACES if name in others), ""):
    return others.pop(usual), tuple(others)
  models = {name: state for name, state in others.items() if not re.search("(?i)ema|average", name)} or others
  found = {"its own entries": content, **models}
  most = max(len(_tensors_of(state)) for state in found.values())
  largest = [name for name, state in found.items() if len(_tensors_of(state)) == most]
  if len(largest) > 1 and most:
    raise ValueError(f"it has several state dicts, {listed(largest)}: save the one to read as a file of its own")
  return found[largest[0]], tuple(name for name in others if name != largest[0])


def _tensors_within(value: Any) -> dict[Any, Any]:
  """A dict with tensors: the value itself, or the entry of a usual key in it; empty if there is none."""
  for _ in range(_DEEPEST_PLACE):
    if not isinstance(value, dict) or _tensors_of(value):
      break
    value = next((value[name] for name in _PLACES if isinstance(value.get(name), dict)), {})
  return value if isinstance(value, dict) and _tensors_of(value) else {}


def _tensors_of(state: dict[Any, Any]) -> dict[str, _Tensor]:
  return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def listed(names: Iterable[Any]) -> str:
  """The first of the names, as many as fit in half a line: in a file they can be long, or contain themselves."""
  text, names = "", list(names)
  for index, name in enumerate(names):
    if text and len(text) + len(shown(name)) > _MOST_SHOWN:
      return f"{text} and {len(names) - index} more"
    text += f", {shown(name)}" if text else shown(name)
  return text or "nothing"


def _flatten(module: Opaque) -> dict[str, _Tensor]:
  """Tensors of a TorchScript module and its submodules, by names such as `visual.conv1.weight`."""
  tensors = {}
  pending, seen = [("", module)], 0
  while pending:
    name, value = pending.pop()
    seen += 1
    if isinstance(value, Opaque) and isinstance(value.state, dict):
      attributes = [key for key in value.state if isinstance(key, str)]
      pending += [(f"{name}.{key}" if name else key, value.state[key]) for key in reversed(attributes)]
    elif isinstance(value, _Tensor) and name in tensors:
      raise ValueError(f"two tensors have the name {shown(name)}")
    elif isinstance(value, _Tensor):
      tensors[name] = value
    if seen + len(pending) > _MOST_NAMES or len(name) > _LONGEST_NAME:
      raise ValueError(f"its modules are nested too deeply, as in {shown(name)}")
  return tensors


def _array(name: str, tensor: _Tensor, read: _Reader, most_bytes: int) -> np.ndarray:
  """A view of the storage, which may have gaps or repeat elements, as slices and expanded tensors do.

  Raises:
    ValueError: the tensor exceeds its storage or `most_bytes`, or has a bit other than "neg".
  """
  storage, offset, shape, stride, bits = tensor
  numbers = (offset, *shape, *stride)
  if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(shape) != len(stride):
    raise ValueError(f"tensor {shown(name)}: bad offset, shape or stride")
  if len(shape) > _MOST_AXES:
    raise ValueError(f"tensor {shown(name)}: {len(shape)} axes, at most {_MOST_AXES} are supported")
  if others := set(bits) - {"neg"}:
    raise ValueError(f"tensor {shown(name)}: a view with the bit {listed(sorted(others))} is not supported")
  size = math.prod(shape)
  steps = [step if count > 1 else 0 for count, step in zip(shape, stride, strict=True)]
  last = offset + sum((count - 1) * step for count, step in zip(shape, steps, strict=True))
  if (last >= storage.size) if size else (offset > storage.size):
    raise ValueError(f"tensor {shown(name)}: shape {shape} at {offset} exceeds its storage of {storage.size} elements")
  width = storage.dtype.itemsize
  if size * width > most_bytes:
    raise ValueError(f"tensor {shown(name)}: shape {shape} repeats elements and is much larger than the file")
  if not size:
    array = np.empty(shape, storage.dtype)
  else:
    data = read(storage)
    if len(data) != storage.size * width:  # NumPy does not check an empty buffer
      raise ValueError(f"tensor {shown(name)}: its storage has {len(data)} bytes, expected {storage.size * width}")
    array = np.ndarray(shape, storage.dtype, data, offset * width, [width * step for step in steps])
  if "neg" in bits:
    array = -array
  array.flags.writeable = False
  return array


# The names that are replaced in a pickle, and the functions in their place. Their arguments are from the file.


def _make_tensor(
  storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, _hooks: Any = None, bits: Any = None, *_: Any
) -> _Tensor | Opaque:
  if isinstance(storage, Opaque):
    return Opaque("torch._utils._rebuild_tensor_v2")
  if not (isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)):
    raise ValueError("damaged: a tensor without storage, shape or stride")
  if not isinstance(bits, dict | None) or not all(isinstance(name, str) for name in bits or {}):
    raise ValueError("damaged: the bits of a tensor are not a dict")
  return _Tensor(storage, offset, shape, stride, tuple(name for name, is_set in (bits or {}).items() if is_set))


def _keep(value: Any, *_: Any) -> Any:
  return value


def _make_type(code: Any, *_: Any) -> _NumpyType | Opaque:
  is_number = isinstance(code, str) and re.fullmatch("[biuf][1248]", code)
  return _NumpyType("numpy.dtype", code=code) if is_number else Opaque("numpy.dtype")


def _make_scalar(kind: Any, data: Any) -> Any:
  """A number; other NumPy values, such as texts, are placeholders."""
  if not isinstance(kind, _NumpyType) or not isinstance(data, bytes) or ">" in (kind.state or ()):
    return Opaque("numpy.scalar")
  if len(data) != np.dtype(kind.code).itemsize:
    raise ValueError("damaged: the size of a NumPy number differs from that of its type")
  return np.frombuffer(data, kind.code)[0].item()


def _encode(text: Any, encoding: Any, *_: Any) -> bytes | Opaque:
  """The bytes of a NumPy number, which old pickles store as text; more bytes, as of an array, are not copied."""
  if not isinstance(text, str) or encoding != "latin1" or len(text) > 16:
    return Opaque("builtins.bytes")
  return text.encode("latin1")


_STORAGES = {
  "BFloat16": np.dtype(ml_dtypes.bfloat16),
  "Bool": np.dtype("?"),
  "Byte": np.dtype("u1"),
  "Char": np.dtype("i1"),
  "ComplexDouble": np.dtype("<c16"),
  "ComplexFloat": np.dtype("<c8"),
  "Double": np.dtype("<f8"),
  "Float": np.dtype("<f4"),
  "Half": np.dtype("<f2"),
  "Int": np.dtype("<i4"),
  "Long": np.dtype("<i8"),
  "Short": np.dtype("<i2"),
}
_DTYPES = ["bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8"]
_NAMES = {
  "_codecs.encode": _encode,
  "numpy._core.multiarray.scalar": _make_scalar,
  "numpy.core.multiarray.scalar": _make_scalar,
  "numpy.dtype": _make_type,
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
  **{f"torch.{name}": f"torch.{name}" for name in _DTYPES},
}


class _TorchUnpickler(Unpickler):
  """Reads plain data and `_Tensor`s; `storages` has every storage that they name."""

  def __init__(self, file: BinaryIO):
    super().__init__(file, _NAMES)
    self.storages: dict[str, _Storage] = {}

  def persistent_load(self, pid: Any) -> _Storage | Opaque:
    match pid:
      case ("storage", np.dtype() as dtype, str() as key, str(), int() as size, *view) if size >= 0 and not any(view):
        storage = _Storage(dtype, key, size)
        if self.storages.setdefault(key, storage) == storage:
          return storage
      case ("storage", kind, str(), str(), int(), *_) if callable(kind):  # of a type that NumPy does not have
        return Opaque("torch.Storage")
    raise ValueError("damaged, or written before PyTorch 0.4: a storage is not described as expected")
