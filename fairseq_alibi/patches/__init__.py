"""Functions of fairseq 0.12.2 that this package replaces."""
