"""Kernels that talk through files instead of ports: two that start at the same moment cannot choose the same ones.

A path is one kernel's alone; with ports, the later kernel may find its own taken, and then it never answers.
"""

import itertools
import os
import tempfile
from typing import Any

from jupyter_client.manager import AsyncKernelManager, KernelManager

FOLDER = tempfile.TemporaryDirectory(prefix="kernels-", ignore_cleanup_errors=True)  # short: a socket's path has to be
NUMBER = itertools.count()


class Sockets:
    """A kernel manager's transport, and an address that no other kernel has."""

    def __init__(self, **options: Any) -> None:
        own = {"transport": "ipc", "ip": f"{FOLDER.name}/{next(NUMBER)}"} if os.name == "posix" else {}
        super().__init__(**own, **options)


class LocalKernel(Sockets, KernelManager):
    """For nbval."""


class AsyncLocalKernel(Sockets, AsyncKernelManager):
    """For nbclient."""
