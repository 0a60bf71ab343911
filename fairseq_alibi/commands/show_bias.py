"""`fairseq-alibi show-bias`."""

from ..evaluation.show_bias import add_arguments
from ..evaluation.show_bias import main as run

__all__ = ["add_arguments", "run"]
