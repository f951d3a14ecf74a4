"""How do tokens attend?"""

from worldstride.attention.dense import Attend, attend, reference
from worldstride.attention.partial import Partial, attend_partial, merge

__all__ = ["Attend", "Partial", "attend", "attend_partial", "merge", "reference"]
