"""Files of `torch.save` made by hand: the first functions return the instructions that push one value."""

from pathlib import Path
import pickle
import pickletools
import struct
import zipfile

import numpy as np

LEGACY_START = b"".join(
  pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)
NUMBERS = np.arange(4, dtype="<f4").tobytes()


def plain(value: object) -> bytes:
  """A number, a text or a container."""
  return pickletools.optimize(pickle.dumps(value, 2))[2:-1]  # without memo instructions, whose indices would collide


def call(module: str, name: str, *arguments: bytes) -> bytes:
  """The result of a function."""
  return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def tensor(offset=0, shape=(2, 2), stride=(2, 1), key="0", size=4, storage="FloatStorage", place="storage") -> bytes:
  """A tensor of the storage `key`."""
  identifier = plain(place) + f"ctorch\n{storage}\n".encode() + plain(key) + plain("cpu") + plain(size)
  arguments = b"(" + identifier + b"tQ", plain(offset), plain(shape), plain(stride), plain(False)
  return call("torch._utils", "_rebuild_tensor_v2", *arguments, call("collections", "OrderedDict"))


def dictionary(**values: bytes) -> bytes:
  """A dict."""
  return b"}(" + b"".join(plain(name) + value for name, value in values.items()) + b"u"


def module(class_name: str, **attributes: bytes) -> bytes:
  """A module of TorchScript."""
  return f"c__torch__\n{class_name}\n".encode() + b")\x81" + dictionary(**attributes) + b"b"


def state_dict(tensors: dict[str, np.ndarray]) -> tuple[bytes, dict[str, bytes]]:
  """The instructions of a state dict of float32, and its storages by their keys."""
  pushed = {}
  for key, (name, x) in enumerate(tensors.items()):
    strides = tuple(stride // 4 for stride in x.strides)
    pushed[name] = tensor(shape=x.shape, stride=strides, key=str(key), size=x.size)
  return dictionary(**pushed), {str(key): x.tobytes() for key, x in enumerate(tensors.values())}


def write_zip(path: Path, content: bytes, **entries: bytes) -> Path:
  """A file with the instructions `content`; storage 0 has four float32."""
  entries = {"data.pkl": b"\x80\x02" + content + b".", "data/0": NUMBERS} | entries
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in entries.items():
      archive.writestr(f"any/{name}", data)
  return path


def write_legacy(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> Path:
  """The same in the format before PyTorch 1.6."""
  storages = storages or {"0": NUMBERS}
  data = b"".join(struct.pack("<q", len(numbers) // 4) + numbers for numbers in storages.values())
  path.write_bytes(LEGACY_START + b"\x80\x02" + content + b"." + pickle.dumps([*storages], 2) + data)
  return path
