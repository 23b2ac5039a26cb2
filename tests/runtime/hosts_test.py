"""Agreement between several processes, with simulated answers of the others."""

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
  ("given", "missing"),
  [
    ({"processes": 2}, "--coordinator and --process"),
    ({"coordinator": "localhost:1"}, "--processes and --process"),
    ({"coordinator": "localhost:1", "processes": 2}, "--process"),
  ],
)
def test_a_process_of_several_needs_all_three_flags(
  given: dict[str, object], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string("coordinator", given.get("coordinator"), "", flag_values=values)
  for name in ("processes", "process"):
    flags.DEFINE_integer(name, given.get(name), "", flag_values=values)
  values(["train"])
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
  with pytest.raises(ValueError, match=f"needs {missing}$"):
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
