"""Tests of models on the hub, by huggingface_hub's client and a server on loopback."""

import json
import logging
from pathlib import Path
import socket
import sys

from hub_server import HubServer, Model
import huggingface_hub.constants
import jax
import numpy as np
import pytest
import references as reference

from declip_jax.weights import hub
from declip_jax.weights.initial import InitFrom, read_initial
from declip_jax.weights.read import from_state_dict, read
from declip_jax.weights.tensor_files import INDEX
from declip_jax.weights.write import write

ADDRESS = "hf-hub:org/model"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
  """A model in each format."""
  folder = tmp_path_factory.mktemp("exports")
  settings = reference.TOLD | {"image.heads": 4, "text.heads": 2}
  weights = from_state_dict(reference.below(reference.load("hf_clip"), "sd/"), settings)
  for format in ("open_clip", "huggingface", "orbax"):
    write(weights, folder / format, format)
  return {path.name: path for path in folder.iterdir()}


def _files(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _sharded(folder: Path) -> dict[str, bytes]:
  """The files of an export whose weights are a part of an index."""
  files = _files(folder)
  part = "model-00001-of-00001.safetensors"
  files[part] = files.pop("model.safetensors")
  names = json.loads(files[part][8 : 8 + int.from_bytes(files[part][:8], "little")])
  weight_map = {name: part for name in names if name != "__metadata__"}
  return files | {f"model.safetensors{INDEX}": json.dumps({"weight_map": weight_map}).encode()}


def _assert_equal(found, expected) -> None:
  assert found.model == expected.model
  assert found.view == expected.view
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


# Files of other frameworks and of people, which nothing needs.
OTHERS = {"README.md": b"#", "tf_model.h5": b"h5", "onnx/model.onnx": b"o", ".gitattributes": b""}


@pytest.mark.parametrize("format", ["open_clip", "huggingface", "sharded", "orbax"])
def test_a_model_is_read_from_the_files_that_it_needs(
  format: str, hub_server: HubServer, exports: dict[str, Path]
) -> None:
  needed = _sharded(exports["huggingface"]) if format == "sharded" else _files(exports[format])
  others = OTHERS if format == "orbax" else {**OTHERS, "pytorch_model.bin": b"the same for PyTorch"}
  hub_server.models["org/model"] = Model({**others, **needed}, refs=("v1",))
  expected = read(exports["huggingface" if format == "sharded" else format])
  _assert_equal(read_initial(InitFrom(ADDRESS), expected.model), expected)
  assert sorted(hub_server.downloads) == sorted(needed)
  hub_server.downloads.clear()
  _assert_equal(read(Path(f"{ADDRESS}@v1")), expected)
  assert not hub_server.downloads  # they are in the cache


def test_open_clips_files_come_first(hub_server: HubServer, exports: dict[str, Path]) -> None:
  hub_server.models["org/model"] = Model({**_files(exports["huggingface"]), **_files(exports["open_clip"])})
  read(ADDRESS)
  assert "open_clip_model.safetensors" in hub_server.downloads
  assert "model.safetensors" not in hub_server.downloads


def test_without_a_network_the_cache_is_read(
  hub_server: HubServer, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  hub_server.models["org/model"] = Model(_files(exports["open_clip"]))
  expected = read(ADDRESS)
  hub_server.fails = True
  _assert_equal(read(ADDRESS), expected)
  assert f"{ADDRESS}: cannot reach {hub_server.url} (" in capsys.readouterr().err
  absent = r", and the cache, /.*, does not have this model$"
  with pytest.raises(OSError, match=rf"^hf-hub:org/other: cannot reach http.* \(.*503.*{absent}") as error:
    read("hf-hub:org/other")
  assert type(error.value) is OSError  # a retry may succeed
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  _assert_equal(read(ADDRESS), expected)
  assert "using the files of" not in capsys.readouterr().err
  with pytest.raises(FileNotFoundError, match=rf"^hf-hub:org/other: HF_HUB_OFFLINE is set{absent}"):
    read("hf-hub:org/other")


@pytest.mark.parametrize("failure", ["nobody listens", "status 503", "the connection is lost"])
def test_failed_attempts_are_one_error_and_other_messages_of_the_client_are_shown(
  failure: str,
  hub_server: HubServer,
  monkeypatch: pytest.MonkeyPatch,
  caplog: pytest.LogCaptureFixture,
) -> None:
  hub_server.models["org/model"] = Model({"config.json": b"{}", "model.safetensors": b"large"})
  hub_server.fails, hub_server.cuts = failure == "status 503", failure == "the connection is lost"
  client = [logging.getLogger(f"huggingface_hub.{name}") for name in ("utils._http", "file_download")]

  def warn(seconds: float) -> None:  # between two attempts
    for logger in client:
      logger.warning("Rate limited. Waiting %ss before retry [Retry 1/5].", seconds)

  monkeypatch.setattr("time.sleep", warn)
  with socket.socket() as bound:
    bound.bind(("127.0.0.1", 0))
    if failure == "nobody listens":
      monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
    with pytest.raises(OSError, match="^hf-hub:org/model: cannot reach "):
      read(ADDRESS)
  assert len(caplog.messages) == 2 * 5
  assert all(text.startswith("Rate limited. Waiting ") for text in caplog.messages)
  for logger in client:
    logger.warning("Retrying in 1s [Retry 1/5].")
  assert len(caplog.messages) == 2 * 5 + 2  # in other uses of the client they are shown


def test_an_interrupted_download_is_not_in_the_cache(
  hub_server: HubServer, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
  hub_server.models["org/model"] = Model(_sharded(exports["huggingface"]))
  download = huggingface_hub.hf_hub_download

  def interrupted(repository: str, name: str, **options) -> str:
    hub_server.fails = name.endswith(".safetensors")
    return download(repository, name, **options)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupted)
  with pytest.raises(OSError, match="cannot reach"):
    read(ADDRESS)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(FileNotFoundError, match="does not have this model"):
    read(ADDRESS)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  hub_server.fails = False
  _assert_equal(read(ADDRESS), read(exports["huggingface"]))


def test_what_cannot_be_read_is_one_line(hub_server: HubServer, exports: dict[str, Path]) -> None:
  hub_server.models["org/gated"] = Model(gated=True)
  hub_server.models["org/tagged"] = Model({"config.json": b"{}"}, refs=("v1.0", "v2.0"))
  hub_server.models["org/text"] = Model({"config.json": b'{"model_type": "bert"}', "model.safetensors": b"large"})
  at = f"{hub_server.url}/org/gated"
  expected = {
    "hf-hub:org/gated": (PermissionError, f"is gated: accept its conditions at {at}, and log in by hf auth login"),
    "hf-hub:org/absent": (FileNotFoundError, "has no model org/absent, or it is private: check the name, or log in"),
    "hf-hub:org/tagged@v1": (FileNotFoundError, "has no revision 'v1': choose one of main, v1.0, v2.0, or a commit"),
    "hf-hub:org/tagged": (FileNotFoundError, "has no weights: expected open_clip_model.safetensors, "),
    "hf-hub:org/text": (ValueError, "/config.json: model_type='bert'"),
    "hf-hub:model": (ValueError, ": expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"),
    "hf-hub:org/model@": (ValueError, ": expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"),
  }
  for address, (kind, text) in expected.items():
    with pytest.raises(kind) as error:
      read(address)
    assert str(error.value).startswith(address)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
  assert hub_server.downloads == ["config.json"]  # of org/text, whose weights are not downloaded


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ModuleNotFoundError, match=r"huggingface_hub is not installed: pip install .*\[hub\]"):
    read(ADDRESS)


@pytest.mark.parametrize("address", ["hf://org/a-model", "https://huggingface.co/org/a-model/tree"])
def test_other_addresses_of_the_hub_are_answered_with_ours(address: str) -> None:
  assert hub.hint(address) == "; for a model on the Hugging Face hub, write hf-hub:org/a-model"
