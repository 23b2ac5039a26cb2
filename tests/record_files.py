"""Damages the last line of a file in the ways of power cuts and editors."""

from collections.abc import Iterator

GARBAGE = (b"\0", b"\xff", b'"', b"}", b"9")


def damages(content: bytes) -> Iterator[bytes]:
  """Yields contents of which the last line is cut off, or has another character, at each of its bytes."""
  start = content.rstrip(b"\n").rfind(b"\n") + 1
  for place in range(start, len(content)):
    yield content[:place]
    yield content[:place] + GARBAGE[place % len(GARBAGE)] + content[place + 1 :]
