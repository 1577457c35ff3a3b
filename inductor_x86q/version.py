"""Which inductor_x86q this is: its version, and a hash of its sources."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).parent


@functools.cache
def sources_digest(root: Path = _ROOT) -> str:
    """A hash of all files that shape what is compiled, by name and contents: every .py and .h, and the cost model's weights.

    torch recommends a hash of the sources for the `uuid` of a custom pass too, and has `get_hash_for_files` for it, which
    takes one file's end for part of the next one and remembers one set of files for all of its callers.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in ("*.py", "*.h", "weights.json") for path in root.rglob(pattern)):
        contents = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(contents)}\n".encode())
        digest.update(contents)
    return digest.hexdigest()
