"""Tensor mathematics, torch only: position methods, attention, layers, adaptive softmax, and the exported model.

from fairseq_alibi.core import ALiBi, Attention, Transformer
"""

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

__all__ = [
    "T5",
    "ALiBi",
    "Attention",
    "Cable",
    "EncoderALiBi",
    "Fire",
    "Fox",
    "Kerple",
    "KerplePower",
    "LayerOptions",
    "Learned",
    "NoPositions",
    "PositionMethod",
    "Rotary",
    "Sandwich",
    "Sinusoidal",
    "Transformer",
    "XPos",
    "position_methods",
    "register_position_method",
]
