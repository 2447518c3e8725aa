"""Calotype: point-in-time snapshots of whole QEMU virtual machines."""

__version__ = "0.1.0"
