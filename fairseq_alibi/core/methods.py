"""The built-in position methods. Importing this module registers all of them.

transformers copies the files of an exported model that are imported by name, so each file is named here.
"""

# ruff: noqa: F401

from .alibi import ALiBi, EncoderALiBi
from .distance_biases import T5, Kerple, KerplePower, Sandwich
from .embeddings import Learned, NoPositions, Sinusoidal
from .fire import Fire
from .forgetting import Cable, Fox
from .rotary import Rotary, XPos

#: What `fairseq-alibi reproduce` compares unless it is given others; `rotary+yarn` is a rotary model at evaluation.
COMPARED = ("alibi", "sinusoidal", "learned", "none", "rotary", "rotary+yarn", "t5", "kerple", "fire", "fox")
