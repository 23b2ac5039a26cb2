"""Tests of `declip_jax.weights.tensor_files` on files of the real PyTorch, and on malicious and confusing files."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import json
import operator
import os
from pathlib import Path
import pickle
import re
import shutil
import struct
import tarfile
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiers import slow_except
from torch_files import LEGACY_START, call, dictionary, module, plain, tensor, write_legacy, write_zip

from declip_jax.weights.tensor_files import read_tensors

FILES = Path(__file__).parents[1] / "fixtures" / "weights"
CHECKPOINTS = sorted(path.name for path in FILES.iterdir() if path.suffix not in (".npz", ".py"))
ELEMENT_TYPES = "float32 float16 bfloat16 float64 uint8 int8 int16 int32 int64 bool".split()  # noqa: SIM905


def expected(group: str) -> dict[str, np.ndarray]:
  """Tensors by name, as PyTorch has them; bfloat16 as float32."""
  with np.load(FILES / "expected.npz") as arrays:
    return {name.removeprefix(f"{group}/"): arrays[name] for name in arrays if name.startswith(f"{group}/")}


def assert_same(tensors: dict[str, np.ndarray], group: str) -> None:
  truth = expected(group)
  assert set(tensors) == set(truth)
  for name, value in truth.items():
    assert tensors[name].shape == value.shape, name
    assert tensors[name].dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else value.dtype), name
    np.testing.assert_array_equal(tensors[name].astype(value.dtype), value, err_msg=name)


@pytest.mark.parametrize("header", ["{'descr': '<f4', (", "{'descr': '<f4', 'shape': (2,)}", "[" * 5000, "\0", "{}"])
def test_damaged_headers_of_numpy_archives_are_rejected(header: str, tmp_path: Path) -> None:
  contents = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(8)
  for entry in (contents, pickle.dumps(3), b"", b"PK\3\4"):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
      archive.writestr("params/t.npy", entry)
    check_rejected(tmp_path / "x.npz", "damaged: params/t.npy is not an array")


def check_rejected(path: Path, message: str) -> None:
  with pytest.raises(ValueError, match=message) as caught:
    read_tensors(path)
  assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
  ("file", "kind", "extras"),
  [
    ("mixed.pt", "torch", {}),
    ("mixed_protocol_5.pt", "torch", {}),
    ("mixed_legacy.pt", "torch", {}),
    ("mixed.safetensors", "safetensors", {"format": "pt"}),
  ],
)
def test_state_dict_equals_pytorch(file, kind, extras):
  found = read_tensors(FILES / file)
  assert_same(found.tensors, "mixed")
  assert {name: found.tensors[name].dtype.name for name in ELEMENT_TYPES} == {name: name for name in ELEMENT_TYPES}
  assert (found.kind, found.extras) == (kind, extras)
  assert not any(value.flags.writeable for value in found.tensors.values())


def test_order_and_sharing_are_kept():
  tensors = read_tensors(str(FILES / "mixed.pt")).tensors
  assert list(tensors) == list(expected("mixed"))
  assert np.shares_memory(tensors["shared_all"], tensors["shared_tail"])


@pytest.mark.parametrize("file", ["training.pt", "training_legacy.pth.tar"])
def test_training_checkpoint(file):
  found = read_tensors(FILES / file)
  assert_same(found.tensors, "training")
  truth = {"epoch": 3, "name": "a run", "best_acc1": 37.25, "last_iter": 1000, "finished": False, "resume": None}
  assert found.extras == truth
  assert {name: type(value) for name, value in found.extras.items()} == {name: type(truth[name]) for name in truth}


def test_optimizer_is_not_read(tmp_path):
  kept = len(expected("training"))  # PyTorch numbers the storages in the order of the file
  with zipfile.ZipFile(FILES / "training.pt") as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
    storages = [name for name in source.namelist() if "/data/" in name]
    for name in source.namelist():
      if name not in storages or int(name.rpartition("/")[2]) < kept:
        target.writestr(name, source.read(name))
  assert len(storages) > 2 * kept
  assert_same(read_tensors(tmp_path / "x.pt").tensors, "training")


def test_torchscript():
  found = read_tensors(FILES / "script.pt")
  truth = expected("script")
  assert found.tensors["visual.layers.0.weight"].dtype == np.float16
  assert found.tensors["visual.input_resolution"].shape == ()
  assert_same(found.tensors, "script")
  assert len(truth) == 7
  assert found.kind == "torchscript"
  assert found.extras["vocab_size"] == 49408
  assert found.extras["training"] is False


def test_torchscript_known_by_its_folders(tmp_path):
  content = dictionary(w=tensor())
  assert read_tensors(write_zip(tmp_path / "x.pt", content)).kind == "torch"
  script = {"constants.pkl": pickle.dumps(()), "code/__torch__.py": b""}
  assert read_tensors(write_zip(tmp_path / "x.pt", content, **script)).kind == "torchscript"


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_handmade_files_without_defects_are_read(tmp_path, write):
  """The file of which each test below changes one thing."""
  content = dictionary(w=tensor(), v=tensor(1, (3, 1), (1, 77)), u=tensor(2, (), ()), t=tensor(shape=(0, 9)))
  tensors = read_tensors(write(tmp_path / "x.pt", content)).tensors
  assert [tensors[name].tolist() for name in "wvut"] == [[[0, 1], [2, 3]], [[1], [2], [3]], 2, []]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (tensor(offset=1), r"tensor w: shape \(2, 2\) at 1 exceeds its storage of 4 elements"),
    (tensor(shape=(2, 3), stride=(3, 1)), "tensor w: .* exceeds its storage"),
    (tensor(shape=(), stride=(), offset=4), "tensor w: .* exceeds its storage"),
    (tensor(shape=(2**40, 4), stride=(0, 1)), r"tensor w: shape \(1099511627776, 4\) repeats elements"),
    (tensor(shape=(2, 2**40), stride=(2, 0)), "repeats elements"),
    (tensor(shape=(2, 3), stride=(0, 2)), "exceeds its storage"),
    (tensor(shape=(2,), stride=(-1,)), "tensor w: bad offset, shape or stride"),
    (tensor(offset=-1), "bad offset"),
    (tensor(offset=None), "bad offset"),
    (tensor(shape=(2**80, 2**80), stride=(2**80, 1)), "bad offset, shape"),
    (tensor(shape=(2**62, 2**62), stride=(2**62, 1)), "exceeds its storage"),
    (tensor(shape=(2, True)), "bad offset, shape"),
    (tensor(shape=(4,)), "bad offset, shape"),
    (tensor(shape=(1,) * 17, stride=(1,) * 17), "17 axes, at most 16"),
    (tensor(shape=[2, 2]), "a tensor without storage, shape or stride"),
    (call("torch._utils", "_rebuild_tensor_v2", plain(1), plain(0), plain(()), plain(())), "a tensor without storage"),
    (tensor(size=5), "storage 0 should have 5 elements|data/0 has 16 bytes, expected 20"),
    (tensor(size=2**60), "storage 0 should have|data/0 has 16 bytes, expected"),
    (tensor(size=-4), "a storage is not described as expected"),
    (tensor(storage="float32"), "a storage is not described as expected"),
    (tensor(place="module"), "a storage is not described as expected"),
    (tensor(key=0), "a storage is not described as expected"),
    (tensor() + plain("v") + tensor(storage="IntStorage"), "a storage is not described as expected"),
    (tensor(key="../data.pkl"), r"damaged"),
    (tensor() + plain("w") + tensor(), "the name w occurs twice"),
    (plain("w") + b"Q", "a storage is not described as expected"),
  ],
)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_bad_tensors(tmp_path, write, content, message):
  check_rejected(write(tmp_path / "x.pt", dictionary(w=content)), message)


@pytest.mark.parametrize(
  ("content", "values"),
  [
    (tensor(shape=(2,), stride=(2,)), [0, 2]),  # a column of two
    (tensor(offset=1, shape=(2, 1), stride=(2, 1)), [[1], [3]]),
    (tensor(shape=(2, 2), stride=(1, 1)), [[0, 1], [1, 2]]),
    (tensor(offset=3, shape=(2, 3), stride=(0, 0)), [[3] * 3] * 2),  # an expanded number
    (tensor(shape=(1, 2), stride=(2**60, 2)), [[0, 2]]),
  ],
)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_slices_and_expanded_tensors(tmp_path, write, content, values):
  assert read_tensors(write(tmp_path / "x.pt", dictionary(w=content))).tensors["w"].tolist() == values


def view(bits: bytes, storage="FloatStorage") -> bytes:
  """A tensor with the state of a view: PyTorch writes `x.imag.conj()` with the bit "neg" and the values of `x.imag`."""
  return tensor(storage=storage)[:-2] + bits + b"tR"


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_negative_view_is_negated(tmp_path, write):
  bits = {"w": b"}", "v": plain({"neg": True}), "u": plain({"neg": False, "conj": False})}
  tensors = read_tensors(
    write(tmp_path / "x.pt", dictionary(**{name: view(bit) for name, bit in bits.items()}))
  ).tensors
  assert {name: array.tolist() for name, array in tensors.items()} == {
    "w": [[0, 1], [2, 3]],
    "v": [[0, -1], [-2, -3]],
    "u": [[0, 1], [2, 3]],
  }
  check_rejected(write(tmp_path / "x.pt", dictionary(w=view(plain({"conj": True})))), "tensor w: .* bit conj")
  check_rejected(write(tmp_path / "x.pt", dictionary(w=view(plain([1])))), "bits of a tensor")


class Harm:
  """Unpickles as a call."""

  def __init__(self, function, *arguments):
    self.reduced = function, arguments

  def __reduce__(self):
    return self.reduced


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("write", [write_zip, write_legacy, None])
@pytest.mark.parametrize(
  ("function", "code", "asked"),
  [
    (os.system, "echo harm > {}", f"{os.system.__module__}.system"),
    (eval, "open({!r}, 'w').write('harm')", "(builtins|__builtin__).eval"),
    (exec, "with open({!r}, 'w') as out: out.write('harm')", "(builtins|__builtin__).exec"),
  ],
)
def test_no_file_runs_code(tmp_path, write, function, code, asked, protocol):
  marker = tmp_path / "marker"
  harm = pickle.dumps({"state_dict": Harm(function, code.format(str(marker)))}, protocol)
  pickle.loads(harm)
  marker.unlink()  # harmful, but not here
  path = tmp_path / "x.pt"
  if write:
    write(path, harm[2:-1])
  else:
    path.write_bytes(harm)
  check_rejected(path, f"its pickle asks for {asked};")
  assert not marker.exists()


@pytest.mark.parametrize(
  "name",
  [
    "posix.system",
    "os.path.join",
    "subprocess.Popen",
    "shutil.rmtree",
    "importlib.import_module",
    "runpy.run_path",
    "__builtin__.execfile",
    "builtins.__import__",
  ],
)
def test_names_that_only_an_attack_asks_for_are_rejected(tmp_path, name):
  owner, _, attribute = name.rpartition(".")
  content = dictionary(w=tensor(), x=call(owner, attribute, plain("x")))
  check_rejected(write_zip(tmp_path / "x.pt", content), f"asks for {re.escape(name)};")


class Settings(dict):
  """A class that only the project that wrote a file has; its items are set like those of a dict."""


class Names(list):
  """The same for a list."""


class Color(enum.Enum):
  """Pickled as a call of its class."""

  RED = 1


OBJECTS = {
  "namespace": argparse.Namespace(output=Path("x"), rate=1e-3, nested=argparse.Namespace(a={1, (2, 3)})),
  "arrays": [np.arange(50.0), np.array(["a", "bc"]), np.zeros(3, ">f4"), np.random.RandomState(0).get_state()],
  "numbers": [np.float64(1), np.bool_(1), np.str_("abc"), np.dtype(">i2"), np.zeros((), ">f8")[()], 2**100, 1 + 2j],
  "dates": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1), datetime.date(2024, 1, 1)],
  "containers": [
    collections.defaultdict(list, a=[1]),
    collections.deque([1]),
    {1, 2},
    frozenset([3]),
    bytearray(b"abc"),
  ],
  "keys": {(1, 2): 3, frozenset([1]): 4, None: 5, 1.5: 6},
  "values": [slice(1, 2), range(3), ..., b"abc", decimal.Decimal("1.5"), types.SimpleNamespace(a=1), re.compile("x")],
  "names": [dict, len, functools.partial(int, "3"), operator.attrgetter("a"), [].append, Path.touch, Settings],
  "own": [Settings(a=1), Names([1, 2]), Color.RED],
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_file_with_objects_next_to_the_tensors_is_read(tmp_path, write, name, protocol):
  value = pickle.dumps(OBJECTS[name], protocol)[:-1]
  content = dictionary(epoch=plain(3), state_dict=dictionary(w=tensor()), other=value)
  found = read_tensors(write(tmp_path / "x.pt", content))
  assert ([*found.tensors], found.extras) == (["w"], {"epoch": 3})


@pytest.mark.parametrize("protocol", [2, 5])
def test_calls_next_to_the_tensors_are_not_made(tmp_path, protocol):
  marker = tmp_path / "marker"
  value = pickle.dumps([Harm(Path.touch, marker), Harm(np.save, str(marker), 1)], protocol)
  pickle.loads(value)
  assert marker.exists()
  assert Path(f"{marker}.npy").exists()
  for file in (marker, Path(f"{marker}.npy")):
    file.unlink()
  found = read_tensors(write_zip(tmp_path / "x.pt", dictionary(w=tensor(), x=value[:-1])))
  assert [*found.tensors] == ["w"]
  assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      b"ccollections\nOrderedDict\n" + dictionary(update=plain(1)) + b"b",
      "an object of type function is given a state",
    ),
    (call("collections", "OrderedDict") + plain({"__class__": 1}) + b"b" + plain("s") + b"s", "damaged"),
    (b"(iposix\nsystem\n", "pickle instruction 0x69"),  # other instructions that call
    (b"(cposix\nsystem\no", "asks for posix.system"),
    (b"\x82\x01", "pickle instruction 0x82"),  # the registry of extensions
    (b"\x96" + struct.pack("<Q", 2**50), "ends too early"),  # a byte array of a petabyte
    (b"X" + struct.pack("<I", 2**32 - 1) + b"x", "damaged"),
    (b"}r" + struct.pack("<I", 2**32 - 1), "no tensors"),  # memo index four billion
    (b"]K\x01b", "an object of type list is given a state"),
    (b"K\x01]b", "an object of type int is given a state"),
    (b"}K\x01a", "an object of type dict is filled like a list"),
    (call("a" * 600, "b" * 600), "damaged: .* name"),
    (b"K\x01)R", "an object of type int is called with an object of type tuple"),
    (b"ccollections\nOrderedDict\nK\x01R", "an object of type function is called with an object of type int"),
    # Nested tuples: printing as many crashes Python.
    pytest.param(b")" + b"\x85" * 10**6 + b"K\x01R", "an object of type tuple is called", marks=pytest.mark.slow),
    (b"q\x00", "damaged"),
    (b"", "damaged"),
    (b"]K\x00K\x01s", "an object of type list is filled like a dict"),
  ],
)
def test_ways_around_the_rejected_names_fail(tmp_path, content, message):
  check_rejected(write_zip(tmp_path / "x.pt", content), message)


@pytest.mark.parametrize(
  ("before", "after"),
  [
    pytest.param(b"", b"\x85", marks=pytest.mark.slow),
    (b"]", b"a"),
    (b"}" + plain("a"), b"s"),
    pytest.param(b"c__torch__\nM\n)\x81}" + plain("a"), b"sb", marks=pytest.mark.slow),
    (b"}", b"K\x01s"),  # as keys
  ],
)
def test_a_hundred_thousand_nested_objects_are_skipped(tmp_path, before, after):
  keys = b"})" + b"\x85" * 10**5 + b"K\x01s"  # tuples, which Python crashes to hash
  content = dictionary(w=tensor(), deep=before * 10**5 + b"N" + after * 10**5, keys=keys)
  assert list(read_tensors(write_zip(tmp_path / "x.pt", content)).tensors) == ["w"]


def test_nested_modules(tmp_path):
  itself = module("M", w=tensor())[:-1] + b"(\x8c\x04selfh\x00ub"  # the module is memo 0
  content = itself.replace(b")\x81", b")\x81q\x00", 1)
  check_rejected(write_zip(tmp_path / "cycle.pt", content), "as in self.self.self")
  many = module("M", w=tensor())
  for _ in range(40):
    many = module("M", a=many + b"q\x00", b=b"h\x00")
  check_rejected(write_zip(tmp_path / "many.pt", many), "nested too deeply")
  twice = module("M", visual=module("N", w=tensor()), **{"visual.w": tensor()})
  check_rejected(write_zip(tmp_path / "twice.pt", twice), "two tensors have the name visual.w")


@pytest.mark.parametrize(
  ("contents", "message"),
  [
    (b"", "empty, 0 bytes"),
    (b"<!DOCTYPE html>\n<html>" + b"x" * 999, "text; it begins with b'<!DOCTYPE html>.*an error page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "text; .*Git LFS"),
    (b"\x1f\x8b\x08\x00abc", "neither a PyTorch nor a safetensors file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(18), "an HDF5 file, as of TensorFlow"),
    (b"PK\5\6" + bytes(18), "neither a PyTorch nor a safetensors file"),
    (b"PK\3\4" + bytes(99), "damaged, truncated.*not a zip file"),
    (b"\x80\x02}.", "a pickle that torch.save did not write"),
    (LEGACY_START.replace(b"\x88", b"\x89") + b"\x80\x02}.", "little-endian"),
    (b"\x05\0\0\0\0\0\0\0{oops", "damaged"),
    (b"\x02\0\0\0\0\0\0\0{}", "no tensors"),
  ],
)
def test_other_contents(tmp_path, contents, message):
  path = tmp_path / "x.pt"
  path.write_bytes(contents)
  check_rejected(path, message)


def test_other_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
    read_tensors(tmp_path / "missing.pt")
  check_rejected(tmp_path, "is a folder")
  with tarfile.open(tmp_path / "x.pth.tar", "w") as tar:
    tar.add(FILES / "mixed.pt", "mixed.pt")
  check_rejected(tmp_path / "x.pth.tar", "a tar archive")
  np.savez(tmp_path / "x.npz", **{"params/img/head/kernel": np.array([None])})
  check_rejected(tmp_path / "x.npz", "Object arrays cannot be loaded")
  shutil.make_archive(str(tmp_path / "x"), "zip", FILES, "make_files.py")
  check_rejected(tmp_path / "x.zip", r"a zip with 0 entries FOLDER/data\.pkl, .* make_files\.py")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      plain({"epoch": 1, "model": {"a": 1}, "optimizer": {}}),
      "under 'state_dict' or 'model'; .* epoch, model, opt",
    ),
    (plain({}), "no tensors .* nothing"),
    (plain([1]), "an object of type list"),
    (tensor(), "an object of type Tensor"),
    (call("argparse", "Namespace") + dictionary(w=tensor()) + b"b", "object of type argparse.Namespace"),
    (module("M", size=plain(1)), "no tensors .* size"),
  ],
)
def test_no_tensors(tmp_path, content, message):
  check_rejected(write_zip(tmp_path / "x.pt", content), message)


def nested(*keys: str, **others: bytes) -> bytes:
  """A dict with the state dict `{"w": ...}` under keys, outermost first, and other entries next to it."""
  content = dictionary(w=tensor(), v=tensor())
  for key in reversed(keys):
    content = dictionary(**{key: content}, **others)
    others = {}
  return content


@pytest.mark.parametrize(
  "content",
  [
    nested("model_state_dict", loss=tensor(), optimizer_state_dict=dictionary(w=tensor(), v=tensor(), u=tensor())),
    nested("module"),
    nested("net", epoch=plain(3)),
    nested("ema"),
    nested("model", "state_dict"),
    nested("checkpoint", "model"),
    nested("my_model", ema_model=dictionary(w=tensor(1), v=tensor(1), u=tensor())),
    nested("my_model", loss=tensor()),
    nested("state_dict", state_dict_ema=dictionary(w=tensor(), x=tensor(), y=tensor())),
  ],
)
def test_the_state_dict_is_found_under_usual_and_other_keys(tmp_path, content):
  tensors = read_tensors(write_zip(tmp_path / "x.pt", content)).tensors
  assert {name: array.tolist() for name, array in tensors.items()} == dict.fromkeys("wv", [[0, 1], [2, 3]])


def test_several_state_dicts_are_not_chosen_from(tmp_path):
  content = nested("student", teacher=dictionary(w=tensor(), v=tensor()))
  check_rejected(
    write_zip(tmp_path / "x.pt", content), "several state dicts, (student, teacher|teacher, student): save"
  )


def test_bad_zip_entries(tmp_path):
  good = dictionary(w=tensor())
  assert len(read_tensors(write_zip(tmp_path / "x.pt", good, byteorder=b"little")).tensors) == 1
  check_rejected(write_zip(tmp_path / "x.pt", good, byteorder=b"big"), "byte order b'big'")
  check_rejected(write_zip(tmp_path / "x.pt", dictionary(w=tensor(key="1"))), "the zip has no any/data/1")
  check_rejected(write_zip(tmp_path / "x.pt", good, **{"data/0": bytes(20)}), r"any/data/0 has 20 bytes, expected 16")
  check_rejected(write_zip(tmp_path / "x.pt", good, **{"data/0": bytes(12)}), r"any/data/0 has 12 bytes, expected 16")
  contents = write_zip(tmp_path / "x.pt", good).read_bytes()
  start = contents.rindex(b"PK\x01\x02", 0, contents.rindex(b"any/data/0"))
  empty = contents[: start + 16] + bytes(8) + contents[start + 24 :]  # checksum and compressed size
  (tmp_path / "x.pt").write_bytes(empty)
  check_rejected(tmp_path / "x.pt", "tensor w: its storage has 0 bytes, expected 16")
  write_zip(tmp_path / "x.pt", good)
  with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
    archive.writestr("any/data/0", bytes(16))
  check_rejected(tmp_path / "x.pt", "two entries of the zip")
  with zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("any/data.pkl", b"\x80\x02" + good + b".")
  check_rejected(tmp_path / "y.pt", r"any/data\.pkl is compressed")


def test_changed_tensor_data_is_noticed(tmp_path):
  contents = bytearray((FILES / "mixed.pt").read_bytes())
  data = expected("mixed")["float32"].tobytes()
  contents[contents.index(data)] ^= 1
  (tmp_path / "x.pt").write_bytes(contents)
  check_rejected(tmp_path / "x.pt", "Bad CRC-32 for file 'mixed/data/0'")


def test_safetensors_whose_header_looks_like_a_pickle(tmp_path):
  header = json.dumps({"w": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}, "__metadata__": {"a": "b"}})
  contents = struct.pack("<Q", 0x280) + header.ljust(0x280).encode() + np.array([1, -2], ml_dtypes.bfloat16).tobytes()
  assert contents.startswith(b"\x80\x02")
  (tmp_path / "x").write_bytes(contents)
  found = read_tensors(tmp_path / "x")
  assert (found.tensors["w"].tolist(), found.extras, found.kind) == ([[1, -2]], {"a": "b"}, "safetensors")
  (tmp_path / "x").write_bytes(contents.replace(b"BF16", b"F8_E4M3")[:-2])
  check_rejected(tmp_path / "x", "damaged")


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ('{"w": W, "w": W}', "the name w occurs twice"),
    ('{"w": W, "__metadata__": {"a": "1", "a": "2"}}', "the name a occurs twice"),
    ('{"w": W, "v": W}', "the data of tensor v starts at byte 0, expected 4"),
    ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "tensor w starts at byte 4, expected 0"),
    ('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"type F32 and shape \[2\] has 4 bytes"),
    ('{"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', r"type F16 and shape \[1\] has 4 bytes"),
    ('{"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}', "tensor w has type F4, expected one of BF16,"),
    ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2]}}', "the data has 4 bytes, expected 2"),
    ('{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "does not describe tensor w"),
    ('{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "does not describe tensor w"),
    ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}', "does not describe tensor w"),
    ('{"w": 3}', "does not describe tensor w"),
    ('{"w": {"dtype": "F32", "shape": [0, 1e99], "data_offsets": [0, 0]}}', "does not describe tensor w"),
    ('{"v": {"dtype": "F32", "shape": [0, 1' + "0" * 60 + '], "data_offsets": [0, 0]}, "w": W}', "dimension"),
    ('{"v": {"dtype": "F32", "shape": [0, 1' + "0" * 6000 + '], "data_offsets": [0, 0]}, "w": W}', "limit"),
    ('{"w": W, "__metadata__": []}', "__metadata__ is not an object"),
    ('{"w": ' + "[" * 100_000, "damaged"),
  ],
)
def test_bad_safetensors_headers(tmp_path, header, message):
  header = header.replace("W", '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}').encode()
  (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + np.float32([7]).tobytes())
  check_rejected(tmp_path / "x", message)


def test_a_header_longer_than_the_file_or_any_model_is_not_read(tmp_path):
  for size in (2**31, 9 << 20):
    with open(tmp_path / "x", "wb") as file:
      file.write(struct.pack("<Q", size) + b"{")
      file.truncate(10 << 20)  # sparse
    check_rejected(tmp_path / "x", f"a header of {size} bytes")


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_every_cut_is_an_error(tmp_path, file):
  contents = (FILES / file).read_bytes()
  path = tmp_path / file
  for stop in {*np.linspace(0, len(contents) - 1, 40).astype(int), 1, 9, len(contents) - 2}:
    path.write_bytes(contents[:stop])
    check_rejected(path, "damaged|0 bytes|neither|text|asks for")


@pytest.mark.parametrize("file", slow_except(("mixed.pt", "mixed.safetensors", "training_legacy.pth.tar"), CHECKPOINTS))
def test_changed_bytes_give_an_error_or_tensors(tmp_path, file):
  contents = np.fromfile(FILES / file, np.uint8)
  random = np.random.default_rng(0)
  path = tmp_path / file
  results = []
  for count in [1] * 80 + [4] * 20:
    changed = contents.copy()
    changed[random.integers(len(contents), size=count)] ^= random.integers(1, 256, count, np.uint8)
    path.write_bytes(changed)
    try:
      results.append(len(read_tensors(path).tensors))
    except ValueError as error:
      assert str(error).startswith(f"{path}: ")  # noqa: PT017
  assert len(results) < 100


def write_index(folder: Path, files: object, **others: object) -> Path:
  """An index as transformers writes it."""
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": files} | others))
  return path


def test_the_files_of_an_index_are_read_as_one(tmp_path):
  """Of safetensors, of PyTorch, and through links to another folder, as in the cache of the Hugging Face hub."""
  save_file({"a": np.float32([1, 2]), "b": np.float16([3])}, tmp_path / "x-1.safetensors")
  write_zip(tmp_path / "x-2.bin", dictionary(c=tensor()))
  index = write_index(tmp_path, {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.bin"})
  (tmp_path / "links").mkdir()
  for file in ("x-1.safetensors", "x-2.bin", index.name):
    (tmp_path / "links" / file).symlink_to(tmp_path / file)
  for path in (index, tmp_path / "links" / index.name):
    tensors = read_tensors(path).tensors
    assert {name: x.tolist() for name, x in tensors.items()} == {"a": [1, 2], "b": [3], "c": [[0, 1], [2, 3]]}
    assert tensors["b"].dtype == np.float16


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"a": "../x.safetensors"}, r"names the file ../x\.safetensors"),
    ({"a": "/etc/x.safetensors"}, "names the file /etc/x.safetensors"),
    ({"a": "sub/x.safetensors"}, "names the file sub/x.safetensors"),
    ({"a": "sub\\x.safetensors"}, "names the file sub"),
    ({"a": ".safetensors"}, r"names the file \.safetensors"),
    ({"a": "x.safetensors\n"}, "names the file x.safetensors"),
    ({"a": "model.safetensors.index.json"}, "names the file model.safetensors.index.json"),  # itself
    ({"a": 3}, "names the file an object of type int"),
    ({"a": "y.safetensors"}, r"y\.safetensors, which does not exist"),
    ({"a": "x.safetensors"}, r"x\.safetensors differ from those in the index: b"),
    ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "differ from those in the index: c"),
    ({f"a{i}": f"x{i}.bin" for i in range(1001)}, "index of 1001 files, expected at most 1000"),
    ({}, "without weight_map"),
    ([], "without weight_map"),
    (None, "without weight_map"),
  ],
)
def test_bad_indexes(tmp_path, files, message):
  (tmp_path / "folder").mkdir()
  save_file({"a": np.float32([1]), "b": np.float32([2])}, tmp_path / "folder" / "x.safetensors")
  shutil.copy(tmp_path / "folder" / "x.safetensors", tmp_path / "x.safetensors")
  check_rejected(write_index(tmp_path / "folder", files), message)


@pytest.mark.parametrize(
  ("contents", "message"),
  [
    ("[1]", "without weight_map"),
    ("{", "not JSON"),
    ("\xff", "not JSON"),
    ("[" * 100_000, "damaged"),
    ('{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "the name a occurs twice"),
    (" " * (9 << 20), "an index of 9437184 bytes"),
  ],
)
def test_indexes_that_are_not_json_of_an_index(tmp_path, contents, message):
  path = tmp_path / "model.safetensors.index.json"
  path.write_text(contents, encoding="latin1")
  check_rejected(path, message)


def test_state_dicts_beside_the_one_that_is_read_are_named(tmp_path):
  optimizer = dictionary(w=tensor())
  content = nested("state_dict", state_dict_ema=dictionary(w=tensor(1)), optimizer=optimizer, epoch=plain(1))
  assert read_tensors(write_zip(tmp_path / "x.pt", content)).left_out == ("state_dict_ema",)
  assert read_tensors(write_zip(tmp_path / "y.pt", nested("ema", optimizer=optimizer))).left_out == ()
