"""Tensor mathematics, torch only: position methods, attention, layers, adaptive softmax; the exported model and tokenizer."""
