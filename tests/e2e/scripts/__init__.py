"""Models played by scripts, for jobs that a list of cells does not express."""
