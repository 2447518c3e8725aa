"""Instruments for tests, shipped: the witness guest, and a VM of it that Calotype runs."""
