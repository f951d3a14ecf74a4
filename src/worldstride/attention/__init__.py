"""How do tokens attend?"""

from worldstride.attention.dense import Attend, attend, reference

__all__ = ["Attend", "attend", "reference"]
