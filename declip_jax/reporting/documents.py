"""A document of headings, paragraphs, tables and pictures, as Markdown and as one HTML page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
import html
from pathlib import Path
import re


@dataclass(frozen=True)
class Heading:
  """A heading.

  Attributes:
    text: its words.
    level: 1 for the title of the document, 2 and 3 below it.
  """

  text: str
  level: int = 2


@dataclass(frozen=True)
class Table:
  """A table; the first column is a name, the others are numbers. `**` around a cell makes it bold.

  Attributes:
    header: names of the columns.
    rows: cells.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
  """A picture.

  Attributes:
    path: a PNG file in the folder of the document, or below it.
    text: what it shows.
  """

  path: Path
  text: str


Block = Heading | Table | Picture | str  # a text is a paragraph

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figure { margin: 1rem 0; } figcaption { color: #666; }
"""


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
  """The document as Markdown; pictures are links relative to the folder that it is written to."""
  return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
  if isinstance(block, Heading):
    return f"{'#' * block.level} {block.text}"
  if isinstance(block, Picture):
    return f"![{block.text}]({block.path.relative_to(folder).as_posix()})"
  if isinstance(block, Table):
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, *block.rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|---|{'--:|' * (len(block.header) - 1)}", *lines[1:]])
  return block


def to_html(blocks: Sequence[Block], title: str) -> str:
  """The document as one page that needs no other file and no JavaScript."""
  body = "\n".join(_html(block) for block in blocks)
  head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
  return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
  if isinstance(block, Heading):
    return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
  if isinstance(block, Picture):
    data = base64.b64encode(block.path.read_bytes()).decode()
    text = html.escape(block.text)
    picture = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
  if isinstance(block, Table):
    header = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>\n" for row in block.rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{rows}</tbody></table>"
  return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
  """Escapes a text; bold and code marks become tags."""
  marked = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
  return re.sub(r"`(.+?)`", r"<code>\1</code>", marked).replace("\\*", "*")
