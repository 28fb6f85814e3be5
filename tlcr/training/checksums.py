"""Checksums that tell a damaged file from a whole one: of disks and copies that change bits, not of people who do."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["of_file", "of_record", "of_samples"]

BLOCK = 1 << 22
"""Bytes that are read at a time."""
SAMPLES, SAMPLE = 64, 1 << 16
"""Places in a file, and the bytes that are read at each."""


def of_file(path: Path) -> str:
    """The CRC-32 of a file's bytes, in hexadecimal."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def of_samples(path: Path) -> str:
    """The CRC-32 of a file's size and of 64 places in it, in hexadecimal.

    It tells other weights from the same ones without reading all of them, and overlooks a change of some bytes.
    """
    size = path.stat().st_size
    value = zlib.crc32(str(size).encode())
    with path.open("rb") as file:
        for place in range(SAMPLES):
            file.seek(place * max(size - SAMPLE, 0) // (SAMPLES - 1))
            value = zlib.crc32(file.read(SAMPLE), value)
    return f"{value:08x}"


def of_record(record: Mapping[str, Any]) -> str:
    """The CRC-32 of a mapping of JSON values; the same before it is written and after it is read."""
    # As it is read: JSON makes texts of keys that are numbers, which then stand in another order.
    as_read = json.loads(json.dumps(record))
    return f"{zlib.crc32(json.dumps(as_read, sort_keys=True).encode()):08x}"
