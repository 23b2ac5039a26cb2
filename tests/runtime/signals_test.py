"""Ctrl-C and SIGTERM between two steps; tests/loop_test.py stops runs by them."""

from collections.abc import Iterator
import os
import queue
import signal
import threading

import pytest

from declip_jax.runtime.signals import Stopped, StopRequest, stop_signals

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
  """What a terminal gives a process; nohup and shells in the background ignore some of these signals."""
  defaults = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
  before = [signal.signal(number, handler) for number, handler in zip(HANDLED, defaults, strict=True)]
  yield
  for number, handler in zip(HANDLED, before, strict=True):
    signal.signal(number, handler)


@pytest.mark.parametrize("signum", HANDLED)
def test_a_signal_is_noted_and_the_handlers_are_restored(signum: int, capsys: pytest.CaptureFixture) -> None:
  before = [signal.getsignal(number) for number in HANDLED]
  request = StopRequest()
  with stop_signals(request):
    assert request.check() == 0
    os.kill(os.getpid(), signum)
    assert request.check() == request.signum == signum
  assert [signal.getsignal(number) for number in HANDLED] == before
  assert f"{signal.Signals(signum).name}: the run saves its steps" in capsys.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_ctrl_c_after_another_signal_still_saves(first: int) -> None:
  with stop_signals(request := StopRequest()):
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), signal.SIGINT)
    assert request.check() == first
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_lost_terminal_stops_nothing() -> None:
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_signals(request := StopRequest()):
      os.kill(os.getpid(), signal.SIGHUP)
      assert request.check() == 0
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_what_the_run_waits_for_at_once() -> None:
  with stop_signals(request := StopRequest()):
    assert request.wait_for(lambda: 3) == 3
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert request.wait_for(queue.Queue().get) is None
    assert request.check() == signal.SIGTERM
    assert request.wait_for(queue.Queue().get) is None
    os.kill(os.getpid(), signal.SIGTERM)  # interrupts nothing else


def interrupt_twice() -> None:
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
  with pytest.raises(KeyboardInterrupt), stop_signals(StopRequest()):
    interrupt_twice()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_with_several_processes_other_signals_become_sigterm(signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr("jax.process_count", lambda: 2)
  received: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))  # JAX's own
  try:
    with stop_signals(request := StopRequest()):
      os.kill(os.getpid(), signum)
    assert received == [signal.SIGTERM]
    assert request.signum == 0
  finally:
    signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
  before, inside = signal.getsignal(signal.SIGTERM), []

  def run() -> None:
    with stop_signals(StopRequest()):
      inside.append(signal.getsignal(signal.SIGTERM))

  (thread := threading.Thread(target=run)).start()
  thread.join()
  assert inside == [before]


def test_preempting_any_process_stops_all() -> None:
  request = StopRequest(lambda number: number == 12, start=10)
  assert [request.check() for _ in range(2)] == [0, signal.SIGTERM]


def test_the_message_names_step_and_signal() -> None:
  assert str(Stopped(7, signal.SIGINT)).startswith("stopped at step 7 by SIGINT")
