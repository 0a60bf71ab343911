"""`fairseq-alibi export-hf`."""

from ..files.export_hf import add_arguments
from ..files.export_hf import main as run

__all__ = ["add_arguments", "run"]
