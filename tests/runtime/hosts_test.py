"""Agreement between several processes, with simulated answers of the others."""

import os
import subprocess
import sys

from absl import flags
import jax
import numpy as np
import pytest

from declip_jax.runtime import hosts

SIZES = [("scenes:train", 32), ("scenes:test", 20)]


def gather(monkeypatch: pytest.MonkeyPatch, others: list[object]) -> None:
  """Simulates other hosts with these values, after the value of this host."""
  monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda mine, **_: np.stack([mine, *others]))


def encoded(error: str) -> np.ndarray:
  return np.frombuffer(error.encode().ljust(400, b"\0"), np.uint8)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"processes": 2}, "needs --coordinator and --process$"),
    ({"coordinator": "localhost:1"}, "needs --processes and --process$"),
    ({"coordinator": "localhost:1", "processes": 2}, "needs --process$"),
    ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "--process=2: expected a number from 0 to 1"),
  ],
)
def test_a_process_of_several_needs_all_three_flags(
  given: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string("coordinator", given.get("coordinator"), "", flag_values=values)
  for name in ("processes", "process"):
    flags.DEFINE_integer(name, given.get(name), "", flag_values=values)
  values(["train"])
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
  with pytest.raises(ValueError, match=message):
    hosts.join_processes()


def test_a_single_process_agrees_with_itself() -> None:
  assert hosts.first_error("") == ""
  assert hosts.first_error("no space left") == "no space left"
  assert hosts.any_host(True)
  assert not hosts.any_host(False)
  hosts.barrier()
  hosts.check_sizes(SIZES)


def test_the_first_error_names_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
  gather(monkeypatch, [encoded(""), encoded("no space left on 2"), encoded("no space left on 3")])
  assert hosts.first_error("") == "host 2: no space left on 2"
  assert hosts.first_error("é" * 300).startswith("host 0: " + "é" * 200)  # cut to 400 bytes
  gather(monkeypatch, [encoded("")])
  assert hosts.first_error("") == ""


def test_any_host_may_answer(monkeypatch: pytest.MonkeyPatch) -> None:
  gather(monkeypatch, [np.int32(0), np.int32(1)])
  assert hosts.any_host(False)
  gather(monkeypatch, [np.int32(0), np.int32(0)])
  assert not hosts.any_host(False)
  assert hosts.any_host(True)


def test_hosts_that_see_different_data_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
  gather(monkeypatch, [np.array([32, 20]), np.array([32, 19])])
  with pytest.raises(ValueError, match=r"scenes:test: .*host 0: 20, host 1: 20, host 2: 19"):
    hosts.check_sizes(SIZES)


@pytest.mark.parametrize(
  ("text", "kind"),
  [
    ("Unable to initialize backend 'cuda': no GPU", ValueError),
    ("Unknown backend: 'gpu' requested", ValueError),
    ("", ValueError),  # as JAX fails where no plugin of this name is installed
    ("Unable to initialize backend 'tpu': the TPU is already in use by process 7", OSError),
  ],
)
def test_a_backend_that_is_missing_is_named(text: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
  def fail() -> None:
    raise RuntimeError(f"{text}\n(more)") if text else AssertionError

  monkeypatch.setattr(jax, "devices", fail)
  with pytest.raises(kind, match=r"^[^\n]*backend[^\n]*$"):
    hosts.check_backend()


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_peer_that_never_joins_ends_the_others_with_a_message(process: int) -> None:
  script = """
import sys
from absl import flags
from declip_jax.runtime import hosts
hosts._JOIN_SECONDS = 2.0
for name, value in (("processes", 2), ("process", int(sys.argv[1])), ("heartbeat", 10)):
  flags.DEFINE_integer(name, value, "")
flags.DEFINE_string("coordinator", "localhost:" + sys.argv[2], "")
flags.DEFINE_bool("multihost", False, "")
flags.FLAGS(sys.argv[:1])
hosts.join_processes()
"""
  port = str(20000 + os.getpid() % 20000)
  command = [sys.executable, "-c", script, str(process), port]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 74, done.stderr
  assert f"error: --coordinator=localhost:{port} --processes=2 --process={process}: not all" in done.stderr


def test_texts_of_all_hosts_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
  mine = ["a\r\nb", "\ud83d é", ""]
  assert hosts.gather_texts(mine) == mine
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(hosts, "gather_rows", lambda rows: np.concatenate([rows, rows]))
  assert hosts.gather_texts(mine) == mine + mine


def test_all_hosts_get_what_the_first_one_passes(monkeypatch: pytest.MonkeyPatch) -> None:
  assert hosts.from_first(b"abc") == b"abc"
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(hosts, "gather_rows", lambda rows: np.concatenate([np.frombuffer(b"first", np.uint8), rows]))
  assert hosts.from_first(b"abc") == b"first"
