"""Annotations as contracts: shapes, dtypes and types of every call in packages that handle arrays are checked.

CONTRACTS=0 turns this off. `tests/objectives tests/evals -m "not slow"` took 43 CPU seconds with it and 37 without,
measured once each with compiled programs cached. Processes that tests start are not checked.
"""

from collections.abc import Callable
import functools
import os
import sys
from typing import Annotated, Any, BinaryIO, Literal, Self

from beartype import BeartypeConf, FrozenDict, beartype
from beartype.vale import Is
from jaxtyping import install_import_hook

WANTED = os.environ.get("CONTRACTS") != "0"
WARNINGS = (
  "error",
  # Tests that crash a writer leave its files open until the garbage is collected in some later test.
  "ignore::ResourceWarning",
  "ignore::pytest.PytestUnraisableExceptionWarning",
)
# Not the rest of `data`, which handles bytes and texts: loops over single numbers, such as those of `sources.heldout`,
# would take many times as long. Nor `reporting` and `runtime`, which write and restore what they are given.
CHECKED = (
  "declip_jax.types",
  "declip_jax.views",
  "declip_jax.unit_norm",
  "declip_jax.sharding",
  "declip_jax.models",
  "declip_jax.objectives",
  "declip_jax.data.finetuning",
  "declip_jax.data.images",
  "declip_jax.data.make_views",
  "declip_jax.data.patches",
  "declip_jax.data.text.augment",
  "declip_jax.data.text.tokenizer",
  "declip_jax.training",
  "declip_jax.evals",
  "declip_jax.planning",
  "declip_jax.weights",
  "declip_jax.clip",
  "declip_jax.image_search",
)
# What is checked in the place of three kinds of annotations. Of a protocol one method: asking for all attributes would
# compute them, such as the stamp of rendered scenes. Of a `Literal` that it is a text: our functions reject other texts
# with messages of their own, which tests read. Of a file that it can be read: beartype also wants a name and a mode.
_LESS: dict[tuple[str, str], Any] = {
  ("declip_jax.data.sources.base", "Source"): Annotated[object, Is[lambda x: hasattr(type(x), "__getitem__")]],
  ("declip_jax.data.text.tokenizer", "Encoder"): Annotated[object, Is[lambda x: hasattr(type(x), "encode")]],
  ("declip_jax.data.images.views", "EngineName"): str,
  ("declip_jax.data.images.views", "Interpolation"): str,
}
_ALWAYS_LESS: dict[Any, Any] = {
  BinaryIO: Annotated[object, Is[lambda x: hasattr(x, "read")]],
  Literal["host", "device"]: str,
}


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
  """beartype's decorator, without Self, which it knows in classes that it decorates."""
  hints = getattr(function, "__annotations__", {})
  hints |= {name: Any for name, hint in hints.items() if hint is Self}
  return beartype(conf=_configuration())(function)


def _configuration() -> BeartypeConf:
  """An int is a float, and less is checked; a module that is being imported may not have its entries of `_LESS` yet."""
  loaded = {getattr(sys.modules.get(module), name, None): hint for (module, name), hint in _LESS.items()}
  overrides = _ALWAYS_LESS | {given: hint for given, hint in loaded.items() if given is not None}
  return BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict(overrides))
