"""Perplexity at any length: windows, scoring, results, tables and plots."""
