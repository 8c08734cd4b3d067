"""The SQLite that the whole program uses: the package's, which is newer than what most systems have; else Python's.

One and the same for every connection: two SQLite libraries in one process would drop each other's locks on a file.
Source: sqlite.org/howtocorrupt.html, 2.2.1.
"""

import sqlite3 as of_python
from types import ModuleType

try:
    import pysqlite3 as of_package
except ImportError:  # there are no files of it for every platform
    of_package = of_python

# The WAL-reset bug can corrupt a database that several processes share; fixed in these and later releases.
# Source: sqlite.org/wal.html, "The WAL-reset bug".
_WAL_FIXES = ((3, 44, 6), (3, 50, 7), (3, 51, 3))

sqlite3: ModuleType = max(of_package, of_python, key=lambda module: module.sqlite_version_info)


def wal_is_safe(version: tuple[int, int, int] | None = None) -> bool:
    """Whether this SQLite, or another version, has the fix for the WAL-reset bug, on its release branch or by age."""
    found = version or sqlite3.sqlite_version_info
    return found >= _WAL_FIXES[-1] or any(found[:2] == fix[:2] and found >= fix for fix in _WAL_FIXES)
