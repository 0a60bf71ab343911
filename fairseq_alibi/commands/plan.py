"""`fairseq-alibi plan`."""

from ..experiments.plan import add_arguments
from ..experiments.plan import main as run

__all__ = ["add_arguments", "run"]
