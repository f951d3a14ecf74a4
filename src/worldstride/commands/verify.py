"""`worldstride verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from worldstride.bench.verify import find_verifier
from worldstride.commands.table import table


@dataclass(frozen=True)
class Verify:
    """Replay a golden file; exit status 0 only if every tensor comes out within tolerance."""

    format: Annotated[Positional[str], arg(metavar="FORMAT")]
    """Format of the file: courtyard, hy_worldplay, matrix_game3."""
    case: Annotated[Positional[Path], arg(metavar="CASE")]
    """The file."""
    record: FlagCreatePairsOff[bool] = False
    """Write the file instead, from this installation."""

    def run(self, command: str) -> int:
        """Print the errors of every tensor; 1 where one is too large."""
        verifier = find_verifier(self.format)
        if self.record:
            verifier.record(self.case)
            print(f"recorded {self.case}")
            return 0
        results = list(verifier.replay(self.case))
        rows = [
            (r.tensor, f"{r.absolute:.2e}", f"{r.relative:.2e}", f"{r.tolerance:.0e}", "yes" if r.fine else "NO")
            for r in results
        ]
        print(table(("tensor", "largest error", "relative", "tolerance", "within"), rows))
        wrong = sum(not r.fine for r in results)
        print(f"\n{len(results) - wrong} of {len(results)} tensors within tolerance")
        return 1 if wrong else 0
