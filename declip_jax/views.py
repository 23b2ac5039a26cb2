"""`Views`: which view of an example plays which role. Does not import JAX, since processes that read data use it."""

from collections.abc import Iterator
from typing import Any, TypeVar

Same = TypeVar("Same", bound="Named")  # not `Self`, which the checker of annotations in tests cannot resolve


class Named:
  """Immutable entries that are read as attributes; an entry that is None does not exist."""

  _entries: dict[str, Any]

  def __init__(self, **entries: Any) -> None:
    found = {name: entries[name] for name in sorted(entries) if entries[name] is not None}
    object.__setattr__(self, "_entries", found)

  def __getattr__(self, name: str) -> Any:
    entries = self.__dict__.get("_entries", {})  # unpickling starts without entries
    if name not in entries:
      raise AttributeError(f"{type(self).__name__} has no {name!r}, only {list(entries)}")
    return entries[name]

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"{type(self).__name__}.{name} is read-only: use replace")

  def __contains__(self, name: str) -> bool:
    return name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __repr__(self) -> str:
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._entries.items())})"

  def replace(self: Same, **changes: Any) -> Same:
    """A copy with some entries changed or added, or removed by None."""
    return type(self)(**{**self._entries, **changes})


class Views(Named):
  """Which view of a `types.Batch` plays which role; a recipe of `data.recipes` decides it. Hashable.

  A role is a name that ends in `_image` or `_text`, and the numbers of its views. A recipe may add roles to those below
  for heads and terms that need others: `Views(mosaic_image=(1,))`; the features of a new text role are
  `types.Features.<role>`.

  Attributes:
    contrastive_image, contrastive_text: views of the contrastive terms; the first of each is the pair that CLIP
      compares, and whose tokens FILIP compares.
    ssl_image: the two views of self-supervision on images.
    masked_text: the text view in which masked language modelling predicts; None if there is none.
    masked_image: the image view in which masked image modelling hides patches; None if there is none.
    neighbour_text: those of `contrastive_text` that search the neighbour bank and are stored in it.

  `classified_image`, a role that only some recipes add, has the views of which the class is predicted.
  """

  contrastive_image: tuple[int, ...]
  contrastive_text: tuple[int, ...]
  ssl_image: tuple[int, ...]
  masked_text: int | None
  masked_image: int | None
  neighbour_text: tuple[int, ...]

  def __init__(
    self,
    contrastive_image: tuple[int, ...] = (0,),
    contrastive_text: tuple[int, ...] = (0,),
    ssl_image: tuple[int, ...] = (),
    masked_text: int | None = None,
    masked_image: int | None = None,
    neighbour_text: tuple[int, ...] = (0,),
    **others: tuple[int, ...],
  ) -> None:
    if wrong := sorted(role for role in others if not role.endswith(("_image", "_text"))):
      raise ValueError(f"roles {wrong} of views: a name has to end in _image or _text")
    roles = {
      "contrastive_image": contrastive_image,
      "contrastive_text": contrastive_text,
      "ssl_image": ssl_image,
      "masked_text": masked_text,
      "masked_image": masked_image,
      "neighbour_text": neighbour_text,
      **others,
    }
    object.__setattr__(self, "_entries", roles)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Views) and self._entries == other._entries

  def __hash__(self) -> int:
    return hash(frozenset(self._entries.items()))

  def numbers(self, role: str) -> tuple[int, ...]:
    """The views of a role as a tuple, empty if no view has it."""
    view = self._entries.get(role)
    return view if isinstance(view, tuple) else () if view is None else (view,)

  def other_texts(self) -> tuple[str, ...]:
    """The text roles that a recipe added."""
    known = ("contrastive_text", "masked_text", "neighbour_text")
    return tuple(role for role in self if role.endswith("_text") and role not in known)
