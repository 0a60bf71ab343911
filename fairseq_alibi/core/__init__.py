"""Tensor mathematics, torch only: position methods, attention, layers, adaptive softmax, and the exported model."""

# ruff: noqa: F401

from .layers import LayerOptions
from .methods import (
    T5,
    ALiBi,
    Cable,
    EncoderALiBi,
    Fire,
    Fox,
    Kerple,
    KerplePower,
    Learned,
    NoPositions,
    Rotary,
    Sandwich,
    Sinusoidal,
    XPos,
)
from .positions import PositionMethod, position_methods, register_position_method
from .transformer import Attention, Transformer
