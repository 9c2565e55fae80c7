"""What tests of ports over databases stand on; see `tests/databases.py`."""

from tests.databases import database, new_store_url, postgres, store_url

__all__ = ["database", "new_store_url", "postgres", "store_url"]
