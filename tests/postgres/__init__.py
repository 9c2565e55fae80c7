"""A real PostgreSQL server for tests, in a container made of Debian's packages."""
