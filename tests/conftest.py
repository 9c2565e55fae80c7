"""What holds for every test."""

from hypothesis import settings

pytest_plugins = ["tests.case_summary"]

# No test is a stopwatch: on a busy machine an example may take as long as it needs. The test's own time-out
# still ends what hangs.
settings.register_profile("rlm", deadline=None)
settings.load_profile("rlm")
