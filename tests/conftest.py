"""What holds for every test."""

import signal

from hypothesis import settings

pytest_plugins = ["tests.case_summary"]

# No test is a stopwatch: on a busy machine an example may take as long as it needs. The test's own time-out
# still ends what hangs.
settings.register_profile("rlm", deadline=None)
settings.load_profile("rlm")

# A shell ignores Ctrl-C for what it starts in the background, and every process that a test starts would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
