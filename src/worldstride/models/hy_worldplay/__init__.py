"""HY-WorldPlay (HY-World 1.5): see `adapter.py`."""
