"""Functions of fairseq 0.12.2 that this package replaces; all are listed in `catalogue`."""

import fairseq  # noqa: F401  first, as the end of its import imports the catalogue, see `fairseq_alibi.register`
