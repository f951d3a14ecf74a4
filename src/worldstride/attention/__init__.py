"""How do tokens attend?"""

from worldstride.attention.choice import Dense
from worldstride.attention.dense import Attend, attend, reference
from worldstride.attention.layout import Layout, boxes, join, runs, serpentine
from worldstride.attention.partial import Partial, merge
from worldstride.attention.preparation import KeyCache, Preparation, prepare_queries
from worldstride.attention.selection import BlockList, Selection, select
from worldstride.attention.sparse import attend_blocks
from worldstride.attention.sparsity import LayerAttend, SparseAttend, Sparsity, SparsityReport, of_layer

__all__ = [
    "Attend",
    "BlockList",
    "Dense",
    "KeyCache",
    "LayerAttend",
    "Layout",
    "Partial",
    "Preparation",
    "Selection",
    "SparseAttend",
    "Sparsity",
    "SparsityReport",
    "attend",
    "attend_blocks",
    "boxes",
    "join",
    "merge",
    "of_layer",
    "prepare_queries",
    "reference",
    "runs",
    "select",
    "serpentine",
]
