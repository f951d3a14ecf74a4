"""`worldstride presets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from worldstride.acceleration import PRESETS, resolve

MEASURED = "courtyard"
"""The model on which presets were measured."""


@dataclass(frozen=True)
class Presets:
    """Print what presets and settings files stand for, as TOML."""

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...")] = ()
    """Presets or .toml files; all presets if none is named."""

    def run(self, command: str) -> int:
        """Print one block of TOML for each; what is at its model's own value is left out."""
        found = [resolve(name) for name in self.names or tuple(PRESETS)]
        print(
            f"# Every model takes the same settings. What they save and cost was measured on {MEASURED}\n"
            "# (docs/architecture.md); on any other model their quality is unmeasured."
        )
        for settings in found:
            print(f"\n{settings.to_toml().strip()}")
        return 0
