"""Reads pickles without executing anything: objects and calls become placeholders.

A pickle is a program for a stack machine that can call any function. Here the machine imports and calls nothing: it
makes numbers, texts and plain containers, and for any other name that the pickle asks for a placeholder, `Opaque`. It
is Python's own `pickle._Unpickler`, not the compiled `pickle.Unpickler`, whose instructions cannot be restricted and
some of which allocate as much memory as the file asks for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
import pickle
import re
import struct
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

_MOST_INSTRUCTIONS = 20_000_000  # of one pickle; each can make an object of some 60 bytes
_LONGEST_NAME = 1000  # bytes of the name of a module or a class
# Names that only an attack asks for. They would become placeholders like any other; rejecting them warns the user.
_HOSTILE = re.compile(
  r"(os|posix|nt|sys|subprocess|shutil|socket|pty|runpy|importlib|ctypes|webbrowser|commands|pip|code|pdb|timeit)\..*"
  r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint)"
)
# What damaged content raises in whoever reads it.
DAMAGE = (
  ArithmeticError,
  AttributeError,
  EOFError,
  LookupError,
  MemoryError,
  RuntimeError,
  TypeError,
  UnicodeError,
  pickle.UnpicklingError,
  struct.error,
)


@dataclass(eq=False)
class Opaque:
  """Inert placeholder for an object of a class, or for the result of a function, that is not plain data.

  Attributes:
    name: qualified name of the class or function.
    state: what the pickle says about the object, for most classes a dict of its attributes.
  """

  name: str
  state: Any = field(default_factory=dict)


def is_plain(value: Any) -> bool:
  """Whether a value is a text, a number, a boolean or None."""
  return value is None or isinstance(value, str | int | float)


def shown(value: Any) -> str:
  """A short description of a value of a file for messages; texts in a file can be long."""
  if isinstance(value, Opaque):
    return f"an object of type {shown(value.name)}"
  return ascii(value[:80])[1:-1] if isinstance(value, str) else f"an object of type {type(value).__name__}"


class _Bounded:
  """The rest of a file, from which no more is read than it has, and at most so many times."""

  def __init__(self, file: BinaryIO, most_reads: int):
    self._file, self._reads = file, most_reads
    start, end = file.tell(), file.seek(0, 2)
    file.seek(start)
    self._left = end - start

  def read(self, size: int) -> bytes:
    self._reads -= 1
    self._left -= size
    if self._left < 0:
      raise EOFError("it ends too early")
    if self._reads < 0:
      raise ValueError("too many instructions for a file of data")
    return self._file.read(size)

  def readline(self) -> bytes:
    line = self._file.readline(_LONGEST_NAME)
    self._left -= len(line)
    if not line.endswith(b"\n"):
      raise EOFError("a name does not end")
    return line


class _Instructions(dict[int, Callable[["Unpickler"], None]]):
  """Maps each byte of a pickle to its instruction."""

  def __missing__(self, code: int) -> NoReturn:
    raise ValueError(f"damaged, or not only plain data: it has the pickle instruction {code:#x}")


def _make_dict() -> dict[Any, Any]:
  return {}


def _make_default_dict(*_: Any) -> dict[Any, Any]:
  return {}


def _keep(value: Any, *_: Any) -> Any:
  return value


# Containers of the standard library that are read as plain ones.
_CONTAINERS = {
  "collections.Counter": _keep,  # of a dict; the step schedules of PyTorch have one
  "collections.OrderedDict": _make_dict,
  "collections.defaultdict": _make_default_dict,
}


class Unpickler(pickle._Unpickler):
  """Reads one pickle.

  Args:
    file: file at the start of the pickle; only the pickle is read from it.
    names: values or functions that replace the names that the pickle may ask for. The functions are called with what
      the file says, and must not copy it: a few bytes that name one big list a thousand times must stay a few
      bytes.
    most_instructions: largest number of instructions and arguments.
  """

  def __init__(
    self,
    file: BinaryIO,
    names: Mapping[str, Any] = MappingProxyType({}),
    most_instructions: int = _MOST_INSTRUCTIONS,
  ):
    super().__init__(_Bounded(file, most_instructions), encoding="utf-8")
    self._replaced = {**_CONTAINERS, **names}

  def load(self) -> Any:
    """The content of the pickle.

    Raises:
      ValueError: it is damaged, too long, or asks for a name that only an attack asks for.
    """
    try:
      return super().load()
    except DAMAGE as error:
      raise ValueError(f"damaged, truncated or not a pickle of data ({type(error).__name__}: {error})") from error

  def find_class(self, module: str, name: str) -> Any:
    if len(module) + len(name) > _LONGEST_NAME:
      raise ValueError(f"damaged: it asks for a name of {len(module) + len(name)} characters, {shown(name)}")
    full_name = f"{module}.{name}"
    if full_name in self._replaced:
      return self._replaced[full_name]
    if _HOSTILE.fullmatch(full_name):
      raise ValueError(f"its pickle asks for {shown(full_name)}; a file of data never does, so the file is rejected")
    return lambda *_: Opaque(full_name)

  def persistent_load(self, pid: Any) -> Any:
    raise ValueError(f"damaged: {shown(pid)} is outside of the pickle")

  # The instructions that differ from Python's.

  def _skip_frame(self) -> None:
    self.read(8)  # what follows is read as if there were no frames

  def _call(self) -> None:
    arguments, function = self.stack.pop(), self.stack[-1]
    if not (callable(function) or isinstance(function, Opaque)) or not isinstance(arguments, tuple):
      raise ValueError(f"damaged: {shown(function)} is called with {shown(arguments)}")
    # What is callable is from find_class.
    self.stack[-1] = Opaque(function.name) if isinstance(function, Opaque) else function(*arguments)

  def _call_with_names(self) -> None:
    self.stack.pop()
    self._call()

  def _set_state(self) -> None:
    state, target = self.stack.pop(), self.stack[-1]
    if isinstance(target, Opaque):
      target.state = state
    elif not isinstance(target, dict):  # a state dict has its versions as a state, which are not needed
      raise ValueError(f"damaged: {shown(target)} is given a state")

  def _append(self) -> None:
    self._extend([self.stack.pop()])

  def _append_many(self) -> None:
    self._extend(self.pop_mark())

  def _extend(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if isinstance(target, list):
      target.extend(items)
    elif not isinstance(target, Opaque):
      raise ValueError(f"damaged: {shown(target)} is filled like a list")

  def _set_item(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self._add_items([key, value])

  def _set_items(self) -> None:
    self._add_items(self.pop_mark())

  def _add_items(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if len(items) % 2 or not isinstance(target, dict | Opaque):
      raise ValueError(f"damaged: {shown(target)} is filled like a dict")
    if isinstance(target, Opaque):
      return
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not is_plain(key):  # left out: to hash a tuple within a million tuples ends Python
        continue
      if key in target:
        raise ValueError(f"the name {shown(key)} occurs twice")
      target[key] = value

  def _skip_bytes(self) -> None:
    self.read(int.from_bytes(self.read(8), "little"))
    self.append(Opaque("builtins.bytearray"))

  def _make_set(self) -> None:
    self.append(Opaque("builtins.set"))  # its elements are not hashed

  def _make_frozen_set(self) -> None:
    self.pop_mark()
    self._make_set()

  _PLAIN = """
    BINBYTES BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINSTRING BINUNICODE EMPTY_DICT EMPTY_LIST
    EMPTY_TUPLE GLOBAL LONG1 LONG4 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE POP POP_MARK PROTO
    SHORT_BINBYTES SHORT_BINSTRING SHORT_BINUNICODE STACK_GLOBAL STOP TUPLE TUPLE1 TUPLE2 TUPLE3
  """
  dispatch = _Instructions(
    {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _PLAIN.split())}
  )
  dispatch[pickle.ADDITEMS[0]] = _append_many
  dispatch[pickle.APPEND[0]] = _append
  dispatch[pickle.APPENDS[0]] = _append_many
  dispatch[pickle.BUILD[0]] = _set_state
  dispatch[pickle.BYTEARRAY8[0]] = _skip_bytes
  dispatch[pickle.EMPTY_SET[0]] = _make_set
  dispatch[pickle.FRAME[0]] = _skip_frame
  dispatch[pickle.FROZENSET[0]] = _make_frozen_set
  dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]] = _call
  dispatch[pickle.NEWOBJ_EX[0]] = _call_with_names
  dispatch[pickle.SETITEM[0]] = _set_item
  dispatch[pickle.SETITEMS[0]] = _set_items
