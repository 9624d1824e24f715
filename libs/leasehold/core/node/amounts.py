"""Amounts of memory as people read them: GB and MB are powers of two, as in every setting."""

from leasehold.core.node import model


def text(amount_bytes: float) -> str:
    """``32.1 GB``; below 1 GB ``64 MB``."""
    if abs(amount_bytes) >= model.GIB:
        return f"{amount_bytes / model.GIB:.1f} GB"
    return f"{amount_bytes / model.MIB:.0f} MB"
