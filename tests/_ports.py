"""A port for a service under test."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_own = []  # a name for each port that this process has given out, which no other process of the tests can take


def free_port() -> int:
    """A free port below those that the system gives out: BentoML takes two of them before it takes this one.

    Nobody else's tests get it, although it is not listened to before the service has started.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        name = socket.socket(socket.AF_UNIX)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            name.bind(f"\0ensembler tests {port}")
            _own.append(name)
            return port
        name.close()
