"""Whether a key is the one that a hash was made of. argon2 runs once for each, and for strangers
apart from everybody else: a flood of keys that nobody has holds up no key that somebody has."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hmac
import logging
import secrets
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from vase_sgl.gateway import keys
from vase_sgl.gateway.errors import KeyNotChecked

logger = logging.getLogger(__name__)

#: argon2 checks at once of keys whose id is known. Each takes 19 MiB.
_PARALLEL_CHECKS = 4
#: Keys with one id that are checked at once or wait for it; more are refused. Only the first check
#: of a key with that id is ever held up by them, and ids are not public.
_CHECKS_PER_ID = 4
#: Decoys that run, one at a time, or wait; beyond that strangers are refused without one.
_WAITING_DECOYS = 32
#: Refused keys remembered, so that a client that goes on with one costs nothing.
_REMEMBERED_REFUSALS = 4096


class KeyChecks:
    """Checks keys, and remembers what came out by digests that mean nothing in another process.

    An outcome depends on nothing but the key and the hash, so it never lapses; it is of no use
    once the hash is no longer in the tenants file.
    """

    def __init__(self) -> None:
        self._digest_key = secrets.token_bytes(32)
        #: Threads of their own: the event loop's serve name look-ups and files too.
        self._threads = ThreadPoolExecutor(_PARALLEL_CHECKS, "vase-key-check")
        self._decoy_thread = ThreadPoolExecutor(1, "vase-key-decoy")
        self._waiting_decoys = 0
        #: Hash -> digest of the key it was made of.
        self._proven: dict[str, bytes] = {}
        #: Digests with the hash they do not fit, or None for an unknown id; least recent first.
        self._refused: collections.OrderedDict[tuple[bytes, str | None], None] = (
            collections.OrderedDict()
        )
        #: Checks under way: hash -> digest of a key -> outcome.
        self._running: dict[str, dict[bytes, asyncio.Future[bool]]] = {}

    def keep_only(self, hashes: Collection[str]) -> None:
        """Forget the keys of all other hashes."""
        self._proven = {h: digest for h, digest in self._proven.items() if h in hashes}

    async def matches(self, key: str, stored_hash: str | None) -> bool:
        """Whether `key` has this hash, which stands in the file for its id; None: nothing does.

        A refusal takes as long for an unknown id as for a known one, while no more strangers come
        than can be checked. Raises `KeyNotChecked` if very many keys with one id come at once, or
        if argon2 fails.
        """
        digest = hmac.digest(self._digest_key, key.encode(), "sha256")
        proven = None if stored_hash is None else self._proven.get(stored_hash)
        if proven is not None and hmac.compare_digest(proven, digest):
            return True
        if (digest, stored_hash) in self._refused:
            self._refused.move_to_end((digest, stored_hash))
            return False
        if stored_hash is not None and proven is None:
            return await self._check(key, stored_hash, digest)
        # Nothing is left to find out: a hash has one key, and an unknown id has none.
        await self._run_decoy(key)
        self._refuse(digest, stored_hash)
        return False

    async def _check(self, key: str, stored_hash: str, digest: bytes) -> bool:
        """Verify with argon2; calls that come with the same key meanwhile share the outcome."""
        running = self._running.setdefault(stored_hash, {})
        if digest not in running:
            if len(running) >= _CHECKS_PER_ID:
                raise KeyNotChecked(
                    "too many API keys with this id are being checked at once; try again in a "
                    "moment",
                    retry_seconds=1.0,
                )
            running[digest] = asyncio.get_running_loop().run_in_executor(
                self._threads, keys.verify, key, stored_hash
            )
            running[digest].add_done_callback(functools.partial(self._checked, stored_hash, digest))
        try:
            return await asyncio.shield(running[digest])
        except keys.NotChecked as error:
            raise KeyNotChecked(
                "the API key could not be checked now; try again in a moment", retry_seconds=1.0
            ) from error

    def _checked(self, stored_hash: str, digest: bytes, outcome: asyncio.Future[bool]) -> None:
        running = self._running[stored_hash]
        del running[digest]
        if not running:
            del self._running[stored_hash]
        if outcome.cancelled():
            return
        if (error := outcome.exception()) is not None:
            logger.error("an API key could not be checked: %s", error)
            return
        if outcome.result():
            self._proven[stored_hash] = digest
        else:
            self._refuse(digest, stored_hash)

    async def _run_decoy(self, key: str) -> None:
        """Take as long as a check. Not in a flood: who waited would hold a call meanwhile."""
        if self._waiting_decoys >= _WAITING_DECOYS:
            return
        self._waiting_decoys += 1
        try:
            with contextlib.suppress(keys.NotChecked):
                await asyncio.get_running_loop().run_in_executor(
                    self._decoy_thread, keys.verify, key, None
                )
        finally:
            self._waiting_decoys -= 1

    def _refuse(self, digest: bytes, stored_hash: str | None) -> None:
        self._refused[digest, stored_hash] = None
        if len(self._refused) > _REMEMBERED_REFUSALS:
            self._refused.popitem(last=False)
