"""The service's records: accounts, pipelines, files, executions and their events, in SQLite or PostgreSQL.

Gateway and executor both open it; neither needs the other to answer. Every function of these modules is one transaction, and
each that changes an execution's state writes down the race that it decides.
"""

from scangraph.store.database import Store, UtcDateTime, now, open_store, whole

__all__ = ["Store", "UtcDateTime", "now", "open_store", "whole"]
