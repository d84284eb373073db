"""Database servers: their state, and how it is probed. Independent of pools and scopes."""
