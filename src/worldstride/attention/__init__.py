"""How do tokens attend?"""

from worldstride.attention.choice import Dense
from worldstride.attention.dense import Attend, attend, reference
from worldstride.attention.partial import Partial, merge

__all__ = ["Attend", "Dense", "Partial", "attend", "merge", "reference"]
