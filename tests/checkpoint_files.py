"""Finds the files of a checkpoint to damage."""

from pathlib import Path


def arrays(folder: Path) -> list[Path]:
  """Files with array data, the largest first."""
  return sorted((path for path in folder.rglob("d/*")), key=lambda path: -path.stat().st_size)


def flip(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
