"""Files that a measurement is written to: whether they can be is known before it takes its minutes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def writable(text: str) -> Path:
    """An argument of the command line that names a file to write."""
    path = Path(text)
    directory = path.absolute().parent
    if path.is_dir() or not directory.is_dir() or not os.access(path if path.exists() else directory, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: name a file in a directory that can be written to")
    return path
