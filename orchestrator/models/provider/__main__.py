"""The program of the provider process. `launch` starts it; it is of no use to a person."""

import sys

from orchestrator.models.provider.process import main

main(int(sys.argv[1]), int(sys.argv[2]))
