"""Matrix-Game-3.0: see `adapter.py`."""
