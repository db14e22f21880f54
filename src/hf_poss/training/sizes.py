"""Sizes as people read them."""

__all__ = ["readable"]


def readable(size: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point: 1536 is "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
