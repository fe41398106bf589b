"""The process's limit of open files: each connection, to a client or a worker, is one."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket

from vase_sgl.gateway.config import GatewayConfig
from vase_sgl.gateway.errors import LimitExceeded

logger = logging.getLogger(__name__)

#: Files beside those of calls: modules, logs, the store, Redis, health checks of workers.
_OTHERS = 256


def needed(config: GatewayConfig) -> int:
    """Files that are open with as many calls as may be.

    A call has a connection of its own to a worker, and at worst one to its client.
    """
    doors = 1 if config.http.port is None else 2
    return 2 * doors * config.grpc.max_concurrent_calls + _OTHERS


def raise_limit(config: GatewayConfig) -> None:
    """Raise the soft limit to the hard one, and warn if that is less than what is needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as error:  # macOS takes no unlimited one
            logger.warning("the limit of %d open files cannot be raised: %s", soft, error)
    if soft != resource.RLIM_INFINITY and soft < needed(config):
        logger.warning(
            "this process may open %d files, and grpc.max_concurrent_calls: %d can need %d; raise "
            "the hard limit (ulimit -Hn, LimitNOFILE), or calls will be refused",
            soft,
            config.grpc.max_concurrent_calls,
            needed(config),
        )


def out_of_files(error: OSError) -> LimitExceeded | None:
    """What to tell the caller if a connection failed for want of a file; else None."""
    number = error.errno
    # The resolver has numbers of its own, and uvloop's sometimes says no more than EINVAL.
    if isinstance(error, socket.gaierror) or number == errno.EINVAL:
        number = _errno_of_opening()
    if number == errno.EMFILE:
        limit = f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open files of its process"
    elif number == errno.ENFILE:
        limit = "open files of its machine"
    else:
        return None
    return LimitExceeded(
        f"this gateway has reached the limit of {limit} and cannot open a connection to a worker; "
        "try again later, or raise the limit",
        reason="files",
        retry_seconds=1.0,
    )


def _errno_of_opening() -> int | None:
    """Why no file can be opened now; None if one can."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno
    return None
