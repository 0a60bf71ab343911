"""The built-in position methods. Importing this module registers all of them.

transformers copies the files of an exported model that are imported by name, so each file is named here.
"""

# ruff: noqa: F401

from .alibi import ALiBi, EncoderALiBi
from .embeddings import Learned, NoPositions, Sinusoidal
from .fire import Fire
from .forgetting import Cable, Fox
from .kerple import Kerple, KerplePower
from .rotary import Rotary, XPos
from .sandwich import Sandwich
from .t5 import T5

#: What `fairseq-alibi reproduce` compares unless it is given others; `rotary+yarn` is a rotary model at evaluation.
COMPARED = ("alibi", "sinusoidal", "learned", "none", "rotary", "rotary+yarn", "t5", "kerple", "fire", "fox")
