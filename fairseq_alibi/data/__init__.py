"""Corpora to fairseq data folders."""
