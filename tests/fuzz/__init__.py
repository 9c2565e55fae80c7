"""Coverage-guided fuzzing of what reads hostile bytes on the host: `make fuzz`.

A target is a module with `one_input(data)`, which raises when a promise is broken, and `seeds()`, from which
its corpus was begun. Targets need no fuzzer: `test_corpus.py` runs them over the corpus like any test.
"""

from typing import Final

TARGETS: Final = ("guest_stream", "replies", "events", "archives")
