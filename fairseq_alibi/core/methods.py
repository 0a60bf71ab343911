"""The built-in position methods. Importing this module registers all of them.

transformers copies the files of an exported model that are imported by name, so each file is named here.
"""

from .alibi import ALiBi, EncoderALiBi
from .embeddings import Learned, NoPositions, Sinusoidal
from .rotary import Rotary
from .t5 import T5

__all__ = ["T5", "ALiBi", "EncoderALiBi", "Learned", "NoPositions", "Rotary", "Sinusoidal"]
