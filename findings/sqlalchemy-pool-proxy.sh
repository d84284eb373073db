#!/usr/bin/env bash
# SQLAlchemy 2.1.9, pool.QueuePool: what a connection of the pool returns for an attribute is the driver's, but what is assigned to it
# stays on the proxy, for this checkout only. django-db-connection-pool hands that proxy to Django as `connection.connection`.
# Expected: a proxy that forwards `getattr` forwards `setattr` too, as wrapt's does, or neither.
# Seen: "read through the proxy: 0; assigned through the proxy, read from the driver: missing"; the next checkout of the same driver
# connection does not have the attribute. The type of the proxy has none of the driver's methods either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'sqlalchemy==2.1.9' 'wrapt==2.5.2'
"$folder/venv/bin/python" - <<'PYTHON'
import sqlite3
import sys

import wrapt
from sqlalchemy import pool


class Connection(sqlite3.Connection):
    pass


queue = pool.QueuePool(lambda: sqlite3.connect(":memory:", factory=Connection), pool_size=1, max_overflow=0)
proxy = queue.connect()
driver = proxy.driver_connection
read = proxy.total_changes
proxy.mark = 1
on_driver = hasattr(driver, "mark")
print(f"read through the proxy: {read}; assigned through the proxy, read from the driver:", "there" if on_driver else "missing")
proxy.close()
again = queue.connect()
same, kept = again.driver_connection is driver, hasattr(again, "mark")
print(f"next checkout: same driver connection {same}, attribute kept {kept}")
has_method = hasattr(type(again), "total_changes")
print("the proxy's type has the driver's attribute:", has_method)
other = sqlite3.connect(":memory:", factory=Connection)
wrapt.ObjectProxy(other).mark = 1
print("wrapt forwards the assignment:", hasattr(other, "mark"))
sys.exit((read, on_driver, same, kept, has_method, hasattr(other, "mark")) != (0, False, True, False, False, True))
PYTHON
