"""Ctrl-C and SIGTERM between two steps; tests/loop_test.py stops runs by them."""

import os
import signal
import threading

import pytest

from declip_jax.runtime.signals import Stopped, StopRequest, stop_signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_are_restored(signum: int) -> None:
  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  request = StopRequest()
  with stop_signals(request):
    assert request.check() == 0
    os.kill(os.getpid(), signum)
    assert request.check() == request.signum == signum
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def interrupt_twice() -> None:
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
  with pytest.raises(KeyboardInterrupt), stop_signals(StopRequest()):
    interrupt_twice()


def test_with_several_processes_ctrl_c_becomes_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr("jax.process_count", lambda: 2)
  received: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))  # JAX's own
  try:
    with stop_signals(request := StopRequest()):
      os.kill(os.getpid(), signal.SIGINT)
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
