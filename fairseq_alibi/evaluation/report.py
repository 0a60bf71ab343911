"""Results of several evaluations as one report: tables and plots in a folder, also as one HTML file."""

import base64
import html
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..files.locks import locked
from ..files.results import check_absent, write_text, written_whole
from .curves import Curve, pool_positions, read_curves
from .paper import paper_section
from .plots import plot_lengths, plot_positions
from .result_files import WAIT
from .tables import length_table, position_table

#: Marks of a line of Markdown, after its characters are escaped, with what they are in HTML.
INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<b>\1</b>"),
)

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;font-size:14px;margin:1em 0;display:block;overflow-x:auto}"
    "th,td{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)


#: What a report says of the environment of a run, with what stands before it.
ENVIRONMENT = {"date": "", "fairseq_alibi": "fairseq-alibi ", "commit": "commit ", "torch": "torch ", "device": ""}
OVERVIEW = "Overview"  # the title of the section that begins a report


class Section(NamedTuple):
    """A part of a report: Markdown, and a plot with the function that draws it into a file."""

    title: str
    text: str
    plot: str = ""  # the name of its file
    draw: Optional[Callable[[Path], Any]] = None

    def markdown(self) -> str:
        """The whole section."""
        plot = f"![{self.title}]({self.plot})" if self.plot else ""
        return "\n\n".join(filter(None, (f"## {self.title}", self.text, plot)))


def write_report(
    files: Sequence[Path],
    output: Path,
    overwrite: bool = False,
    paper: bool = False,
    others: Sequence[Section] = (),
    page: bool = False,
) -> tuple[str, list[Path]]:
    """Writes a report of evaluations into a folder; returns the table of perplexity and the paths of its files.

    `paper` adds the paper's numbers, also to the table; of the `others`, further sections, one with the title
    `OVERVIEW` comes first; `page` writes the report as one HTML file, too. ValueError names bad input and the remedy.
    """
    curves = read_curves(files) if files else []
    if not curves and (files or not others):
        raise ValueError(f"no result in {', '.join(map(str, files))}: the evaluation ended before its first length")
    shown = length_table(curves, "simple") if curves else ""
    first = [section for section in others if section.title == OVERVIEW]
    sections = [*first, *(evaluation_sections(curves, files) if curves else [])]
    sections += [section for section in others if section not in first]
    if paper:
        sections.append(Section("Beside the paper", paper_section(curves)))
        shown += f"\n\n## Beside the paper\n\n{sections[-1].text}"
    text = "# Results\n\n" if page else ""
    text += "\n\n".join(section.markdown() for section in sections) + "\n"
    paths = [output / name for name in ("report.md", *(one.plot for one in sections if one.plot))]
    paths += [output / "report.html"] if page else []
    with locked(output, WAIT):
        check_absent(paths, overwrite)
        for section in sections:
            if section.draw:
                with written_whole(output / section.plot) as partial:
                    section.draw(partial)
        if page:
            write_text(output / "report.html", html_page(text, output))
        write_text(output / "report.md", text)
    return shown, paths


def evaluation_sections(curves: Sequence[Curve], files: Sequence[Path]) -> Iterator[Section]:
    """Perplexity, bits per byte, speed and loss by position, as far as the results have them."""
    table, pooled = length_table, pool_positions(curves)
    yield Section("Perplexity", table(curves, "github"), "report.png", lambda path: plot_lengths(curves, path))
    if by_byte := [curve for curve in curves if curve.bits_per_byte]:
        yield Section("Bits per byte of the text as it was given", table(by_byte, "github", "bits_per_byte"))
    if timed := read_curves(files, by_speed=True):
        speed = "tokens_per_second"
        text, draw = table(timed, "github", speed), lambda path: plot_lengths(timed, path, speed)
        yield Section("Tokens per second", text, "speed.png", draw)
    if pooled:
        title, draw = "Loss, bits per token, by position in the window", lambda path: plot_positions(pooled, path)
        yield Section(title, position_table(pooled), "positions.png", draw)
    yield Section("What made the perplexities", "\n".join(f"- {line}" for curve in curves for line in runs_of(curve)))


def runs_of(curve: Curve) -> Iterator[str]:
    """A line of Markdown for each run that made numbers of a curve: its lengths, versions, device, date and command."""
    lengths: dict[str, list[int]] = {}
    for length, run in sorted(curve.run.items()):
        environment = run["environment"]
        known = [f"`{' '.join(str(run['command']).split())}`"] if run.get("command") else []
        known += [title + str(environment[name]) for name, title in ENVIRONMENT.items() if name in environment]
        lengths.setdefault("; ".join(known) or "unknown", []).append(length)
    for made_by, of_run in lengths.items():
        yield f"**{curve.label}**, length {', '.join(f'{length:,}' for length in of_run)}: {made_by}"


def inline(text: str) -> str:
    """A line of Markdown as HTML."""
    text = html.escape(text)
    for pattern, replacement in INLINE:
        text = pattern.sub(replacement, text)
    return text


def html_page(markdown: str, folder: Path) -> str:
    """Markdown as reports have it, as one HTML page that holds its PNG files, so that it needs no other file.

    Known are headings, paragraphs, tables, lists, images on a line of their own, code and bold type.
    """
    body = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        lines = block.splitlines()
        if image := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            data = base64.b64encode((folder / image[2]).read_bytes()).decode()
            body.append(f'<img alt="{html.escape(image[1])}" src="data:image/png;base64,{data}">')
        elif heading := re.fullmatch(r"(#+) (.*)", block):
            level = len(heading[1])
            body.append(f"<h{level}>{inline(heading[2])}</h{level}>")
        elif block.startswith("|"):
            rows = [[inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            kinds = ["th", *["td"] * (len(rows) - 2)]
            cells = (
                "".join(f"<{kind}>{cell}</{kind}>" for cell in row) for kind, row in zip(kinds, [rows[0], *rows[2:]])
            )
            body.append("<table>" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        elif all(line.startswith("- ") for line in lines):
            body.append("<ul>" + "\n".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            body.append(f"<p>{inline(block)}</p>")
    title = html.escape(re.sub("^#+ ", "", markdown.partition("\n")[0]))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
