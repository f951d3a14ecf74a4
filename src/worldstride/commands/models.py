"""`worldstride models`."""

from __future__ import annotations

from dataclasses import dataclass

from worldstride.commands.table import table
from worldstride.models.registry import MODELS


@dataclass(frozen=True)
class Models:
    """List the world models that can be loaded by name."""

    def run(self, command: str) -> int:
        """Print the table."""
        rows = [(m.name, m.parameters, m.weights, ", ".join(m.decoders) or "-", m.licence) for m in MODELS]
        print(table(("name", "parameters", "weights", "decoders", "licence"), rows))
        return 0
