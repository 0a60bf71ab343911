"""Results of several evaluations as one report: tables and plots in a folder."""

from collections.abc import Sequence
from pathlib import Path

from ..files.locks import locked
from ..files.results import check_absent, write_text, written_whole
from .curves import Curve, pool_positions, read_curves
from .paper import paper_section
from .plots import plot_lengths, plot_positions
from .result_files import WAIT
from .tables import length_table, position_table

#: The files of a report; the last two are written only if results have what they show.
REPORT_FILES = ("report.md", "report.png", "speed.png", "positions.png")


def write_report(files: Sequence[Path], output: Path, overwrite: bool = False, paper: bool = False) -> str:
    """Writes a report of result files into a folder and returns the table of perplexity; ValueError for bad input.

    With `paper` both have the paper's numbers beside those measured, too.
    """
    curves = read_curves(files)
    if not curves:
        raise ValueError(f"no result in {', '.join(map(str, files))}: the evaluation ended before its first length")
    with locked(output, WAIT):
        check_absent((output / name for name in REPORT_FILES), overwrite)
        timed = read_curves(files, by_speed=True)
        section = f"\n\n## Beside the paper\n\n{paper_section(curves)}" if paper else ""
        write_report_files(curves, timed, section, output)
    return length_table(curves, "simple") + section


def write_report_files(curves: Sequence[Curve], timed: Sequence[Curve], section: str, output: Path) -> None:
    """Writes the files of a report, see `write_report`; `timed` are its curves of speed, `section` its end."""
    pooled = pool_positions(curves)
    by_byte = [curve for curve in curves if curve.bits_per_byte]
    text = "Perplexity.\n\n" + length_table(curves, "github") + "\n"
    with written_whole(output / "report.png") as partial:
        plot_lengths(curves, partial)
    if by_byte:
        text += "\nBits per byte of the text as it was given.\n\n"
        text += length_table(by_byte, "github", "bits_per_byte") + "\n"
    if timed:
        text += "\nTokens per second.\n\n" + length_table(timed, "github", "tokens_per_second") + "\n"
        with written_whole(output / "speed.png") as partial:
            plot_lengths(timed, partial, "tokens_per_second")
    if pooled:
        text += "\nLoss, bits per token, by position in the window.\n\n" + position_table(pooled) + "\n"
        with written_whole(output / "positions.png") as partial:
            plot_positions(pooled, partial)
    write_text(output / "report.md", text.rstrip("\n") + section + "\n")
