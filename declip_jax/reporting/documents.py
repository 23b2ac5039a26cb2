"""A document of headings, paragraphs, lists, tables and pictures, as Markdown, one HTML page, and tables of LaTeX."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
import html
from pathlib import Path
import re
from urllib.parse import quote


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
  """A table of texts and, to the right of them, numbers. `**` around a cell makes it bold.

  Attributes:
    header: names of the columns.
    rows: cells.
    texts: number of columns that are texts.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  texts: int = 1


@dataclass(frozen=True)
class Listing:
  """A list of sentences.

  Attributes:
    items: the sentences.
  """

  items: Sequence[str]


@dataclass(frozen=True)
class Picture:
  """A picture.

  Attributes:
    path: a PNG file in the folder of the document, or below it.
    text: what it shows.
  """

  path: Path
  text: str


@dataclass(frozen=True)
class Code:
  """Commands or a file, shown as they are.

  Attributes:
    text: the lines.
    summary: what is shown of it until it is opened, in HTML; "" shows it all.
  """

  text: str
  summary: str = ""


Block = Heading | Table | Listing | Picture | Code | str  # a text is a paragraph

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
.text { text-align: left; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; }
figure { margin: 1rem 0; } figcaption { color: #666; }
"""


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
  """The document as Markdown; pictures are links relative to the folder that it is written to."""
  return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
  if isinstance(block, Heading):
    return f"{'#' * block.level} {block.text}"
  if isinstance(block, Picture):
    return f"![{block.text}]({block.path.relative_to(folder).as_posix()})\n\n*{block.text}*"
  if isinstance(block, Code):
    return f"```\n{block.text}\n```"
  if isinstance(block, Listing):
    return "\n".join(f"* {item}" for item in block.items)
  if isinstance(block, Table):
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, *block.rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    marks = ["---" if column < block.texts else "--:" for column in range(len(block.header))]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])
  return block


def to_html(blocks: Sequence[Block], title: str, folder: Path | None = None) -> str:
  """The document as one page without JavaScript.

  Args:
    blocks: the document.
    title: title of the window.
    folder: folder that it is written to, for pictures as relative links; None embeds them, and the page needs no other
      file.
  """
  body = "\n".join(_html(block, folder) for block in blocks)
  head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
  return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block, folder: Path | None) -> str:
  if isinstance(block, Heading):
    return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
  if isinstance(block, Picture):
    text = html.escape(block.text)
    if folder is None:
      source = f"data:image/png;base64,{base64.b64encode(block.path.read_bytes()).decode()}"
    else:
      source = html.escape(quote(block.path.relative_to(folder).as_posix()))
    picture = f'<img alt="{text}" src="{source}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
  if isinstance(block, Table):
    rows = "".join(f"{_html_row('td', row, block.texts)}\n" for row in block.rows)
    return f"<table><thead>{_html_row('th', block.header, block.texts)}</thead><tbody>\n{rows}</tbody></table>"
  if isinstance(block, Code):
    code = f"<pre>{html.escape(block.text)}</pre>"
    return f"<details><summary>{html.escape(block.summary)}</summary>{code}</details>" if block.summary else code
  if isinstance(block, Listing):
    return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in block.items)}</ul>"
  return f"<p>{_inline(block)}</p>"


def _html_row(tag: str, cells: Sequence[str], texts: int) -> str:
  marks = (' class="text"' if column < texts else "" for column in range(len(cells)))
  return f"<tr>{''.join(f'<{tag}{mark}>{_inline(cell)}</{tag}>' for mark, cell in zip(marks, cells, strict=True))}</tr>"


def to_latex(blocks: Sequence[Block]) -> str:
  """The tables of the document for LaTeX with the package booktabs, each after the heading above it as a comment."""
  parts, heading = [], ""
  for block in blocks:
    if isinstance(block, Heading):
      heading = block.text
    if isinstance(block, Table):
      columns = "".join("l" if column < block.texts else "r" for column in range(len(block.header)))
      rows = [" & ".join(map(_latex, row)) + r" \\" for row in (block.header, *block.rows)]
      body = "\n".join([r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"])
      parts.append(f"% {heading}\n\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n")
  return "\n".join(parts)


_LATEX = {
  "\\": r"\textbackslash{}",
  **{sign: f"\\{sign}" for sign in "&%$#_{}"},
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "‡": r"$^\ddagger$",
  "§": r"\S",
  "²": "$^2$",
}


def _latex(cell: str) -> str:
  """A cell for LaTeX, with its bold and code marks."""
  escaped = "".join(_LATEX.get(sign, sign) for sign in cell.replace("\\*", "\0")).replace("\0", "*")
  bold = re.sub(r"\*\*([^*]+)\*\*", r"\\textbf{\1}", escaped)
  return re.sub(r"`([^`]+)`", r"\\texttt{\1}", bold)


def _inline(text: str) -> str:
  """Escapes a text; bold and code marks become tags."""
  marked = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
  return re.sub(r"`(.+?)`", r"<code>\1</code>", marked).replace("\\*", "*")
