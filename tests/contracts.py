"""Annotations as contracts: shapes, dtypes and types of every call in packages that handle arrays are checked.

CONTRACTS=0 turns this off. `tests/objectives tests/evals -m "not slow"` took 43 CPU seconds with it and 37 without,
measured once each with compiled programs cached. Processes that tests start are not checked.
"""

from collections.abc import Callable
import functools
import os
from typing import Any, Self

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

WANTED = os.environ.get("CONTRACTS") != "0"
WARNINGS = (
  "error",
  # Tests that crash a writer leave its files open until the garbage is collected in some later test.
  "ignore::ResourceWarning",
  "ignore::pytest.PytestUnraisableExceptionWarning",
)
# Not the rest of `data`, whose protocols cannot be checked at run time and whose options (`images.views`) are promised
# as literals and rejected with messages of their own, nor `weights`, whose readers pass on whatever a
# file contains: numpy's scalars, tensors of PyTorch, dicts of either.
CHECKED = (
  "declip_jax.types",
  "declip_jax.views",
  "declip_jax.unit_norm",
  "declip_jax.sharding",
  "declip_jax.models",
  "declip_jax.objectives",
  "declip_jax.data.images.exact",
  "declip_jax.data.images.fast",
  "declip_jax.data.images.geometry",
  "declip_jax.data.images.photo",
  "declip_jax.data.patches",
  "declip_jax.training",
  "declip_jax.evals",
  "declip_jax.planning",
  "declip_jax.clip",
)


def check_calls() -> None:
  """Turns the checks on for modules imported from now on; a violation raises `jaxtyping.TypeCheckError`."""
  install_import_hook(CHECKED, "contracts.check")


_checked: dict[Any, Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
  """beartype's decorator, applied at the first call.

  Most functions are not called in a process of the tests, and those that are defined in other functions are defined
  often: functions with the same code and annotations share a decorated one. (`jaxtyping` passes functions without a
  body, which differ in nothing else.)
  """
  checked = None

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    nonlocal checked
    if checked is None:
      key = function.__module__, function.__qualname__, function.__code__, str(function.__annotations__)
      if key not in _checked:
        _checked[key] = _decorated(function)
      checked = _checked[key]
    return checked(*args, **kwargs)

  return call


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
  """beartype's decorator, where an int is a float, and without Self, which it knows in classes that it decorates."""
  hints = getattr(function, "__annotations__", {})
  hints |= {name: Any for name, hint in hints.items() if hint is Self}
  return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
