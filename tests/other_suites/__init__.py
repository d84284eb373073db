"""
The tests of other packages on a real PostgreSQL whose replica is a test mirror.

Each suite runs twice: with the mirror alone, and with the package beside it. A test that fails
only with the package is a fault, unless the suite's module names it with a reason.
"""
