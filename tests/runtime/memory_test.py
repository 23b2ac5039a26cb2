"""A lack of memory is one line with the amount that was needed and how to need less."""

import jax
import pytest

from declip_jax import command_line
from declip_jax.runtime.memory import OutOfMemory, explained


@pytest.mark.parametrize(
  ("error", "named"),
  [
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 6442450944 bytes."), ": 6.0 GiB"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB."), ": 12.5 GiB"),
    (
      jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.48G of 15.48G hbm."
      ),
      ": 20.5 GiB",
    ),
    (jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"), "out of memory: lower"),
    (MemoryError("pairs.csv row 7"), "out of memory on this machine (pairs.csv row 7): lower"),
    (MemoryError(), "out of memory on this machine: lower"),
  ],
)
def test_a_lack_of_memory_names_the_amount_and_the_remedy(
  error: Exception, named: str, capsys: pytest.CaptureFixture
) -> None:
  with pytest.raises(OutOfMemory) as raised, explained("lower config.batch_size"):
    raise error
  assert named in str(raised.value)
  assert "lower config.batch_size" in str(raised.value)
  assert isinstance(raised.value, command_line.USER_ERRORS)
  assert command_line.report(raised.value) == 2  # no launcher retries it
  assert capsys.readouterr().err.count("\n") == 1


def test_other_errors_are_left_alone() -> None:
  with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"), explained("lower it"):
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes")
