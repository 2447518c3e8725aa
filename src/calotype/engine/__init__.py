"""Whole operations: observe, plan, then act step by step. Begin reading in `operations.py`."""
