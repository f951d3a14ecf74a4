"""What a world model must offer, and the values that pass between it and the loop.

Two structures fit: models that write keys and values of remembered latents once a chunk and denoise against them,
and models that join memory, past and new latents in one bidirectional sequence in every evaluation (their context
is the plain latents). A model is stateless: whatever a chunk needs arrives as arguments, whatever it makes is
returned. Shapes carry a batch dimension B of independent worlds; a session has B = 1. T counts latents, F frames.
`worldstride.testing.check_model` checks an implementation.
"""

from worldstride.protocol.abilities import (
    AttendsSparsely,
    BeginsWithImage,
    Compilable,
    Costed,
    EncodesPrompt,
    FillsSlots,
    FreezesContext,
    KeepsLatents,
    LabelsMotion,
    Narrows,
    Navigates,
    Navigator,
    Quantises,
    Recalls,
    ReusesAttention,
)
from worldstride.protocol.model import Decoder, WorldModel
from worldstride.protocol.values import (
    KINDS,
    ChunkShape,
    Conditions,
    Context,
    Inputs,
    Kind,
    Led,
    Recalled,
    SamplerSpec,
)

__all__ = [
    "KINDS",
    "AttendsSparsely",
    "BeginsWithImage",
    "ChunkShape",
    "Compilable",
    "Conditions",
    "Context",
    "Costed",
    "Decoder",
    "EncodesPrompt",
    "FillsSlots",
    "FreezesContext",
    "Inputs",
    "KeepsLatents",
    "Kind",
    "LabelsMotion",
    "Led",
    "Narrows",
    "Navigates",
    "Navigator",
    "Quantises",
    "Recalled",
    "Recalls",
    "ReusesAttention",
    "SamplerSpec",
    "WorldModel",
]
