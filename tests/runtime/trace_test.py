"""The profile of some steps."""

from pathlib import Path

import pytest

from declip_jax.runtime.trace import Trace, parse_steps


@pytest.mark.parametrize("text", ["100", "5:3", "0:2", "a:b"])
def test_steps_to_trace_are_checked(text: str) -> None:
  with pytest.raises(ValueError, match=rf"--profile='{text}'.*100:110"):
    parse_steps(text)


def test_steps_to_trace_are_parsed() -> None:
  assert parse_steps("100:110") == (100, 110)


def test_a_trace_outside_the_run_is_reported(tmp_path: Path) -> None:
  assert Trace(tmp_path, (3, 4)).unreachable(2, 8) == ""
  for start, total in ((4, 8), (0, 2)):
    message = Trace(tmp_path, (3, 4)).unreachable(start, total)
    assert "--profile=3:4" in message
    assert f"{start + 1} to {total}" in message
  assert Trace(tmp_path, None).unreachable(0, 8) == ""


def test_a_trace_covers_its_steps_and_ends_with_the_run(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  calls: list[str] = []
  monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append(f"start {folder}"))
  monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
  with Trace(tmp_path, (3, 4)) as trace:
    for step in range(1, 7):
      calls.append(str(step))
      trace.begin(step, ())
      assert bool(trace.end(step, ())) == (step == 4)
  assert calls == ["1", "2", "3", f"start {tmp_path}", "4", "stop", "5", "6"]
  calls.clear()
  with Trace(tmp_path, (3, 9)) as trace:
    trace.begin(5, ())  # a run that resumed within the steps to trace
  assert calls == [f"start {tmp_path}", "stop"]
  assert f"tensorboard --logdir {tmp_path}" in capsys.readouterr().err
