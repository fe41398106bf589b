"""Locust's users: each repeats the calls of the scenario, as one tenant."""

from __future__ import annotations

import collections
import itertools
import random
import time
from typing import ClassVar

from gevent import GreenletExit
from locust import User, task
from locust.exception import StopUser

from loadtest import calls
from loadtest.prompts import Synthetic
from loadtest.rows import Recorder
from loadtest.session import Session
from loadtest.span import Span
from loadtest.tenants import Tenant
from vase_sgl.client import Message, Prompt

#: Pause after a failure, and after a refusal without a hint. A gateway that is down would be
#: asked thousands of times a second otherwise.
_BACK_OFF_SECONDS = 1.0
#: Pause of a noisy tenant after a refusal.
_NOISY_SECONDS = 0.05
#: Own records a user remembers for replays.
_REMEMBERED = 32

_numbers = itertools.count()


class GatewayUser(User):
    """A user of a gateway, measured. `for_tenant` makes the classes that run."""

    abstract = True
    session: ClassVar[Session]
    tenant: ClassVar[Tenant]
    span: ClassVar[Span]
    _ending = False

    @classmethod
    def for_tenant(cls, session: Session, tenant: Tenant, span: Span) -> type[GatewayUser]:
        """A class of users of one tenant: Locust shares users out by the weights of classes."""
        fields = {
            "session": session,
            "tenant": tenant,
            "span": span,
            "weight": tenant.weight,
            "abstract": False,
        }
        return type(tenant.name, (cls,), fields)

    def on_start(self) -> None:
        """Look up what the test is about: the web form may have changed it since the last one."""
        self.settings = self.session.settings
        self._recorder = Recorder(self.environment, self.span, self.tenant.name)
        self._client = self.session.client(self.environment.host, self.tenant)
        worker = self.environment.runner.worker_index
        self._rng = random.Random(f"{self.settings.prompt_seed}/{worker}/{next(_numbers)}")
        self._pause = 0.0
        self._conversation: list[Message] = []
        self._records: collections.deque[str] = collections.deque(maxlen=_REMEMBERED)

    def stop(self, force: bool = False) -> bool:
        """Let the running call end, unless forced."""
        # Locust kills a user it sees waiting. One that wakes at that moment must not call again.
        self._ending = True
        return bool(super().stop(force))

    def wait_time(self) -> float:
        """Seconds until the next call; the end of the test does not wait for them."""
        return self._pause

    @task
    def call(self) -> None:
        """One call. When the test ends first, it is cancelled and counted as unfinished."""
        if self._ending:
            raise StopUser
        self._called = time.perf_counter()
        self._arrived = 0
        self._ttft_seconds: float | None = None
        try:
            match self.settings.load.calls:
                case "answers":
                    self._answer()
                case "conversation":
                    self._turn()
                case "replays" if self._records and self._is_replay():
                    self._replay()
                case "replays":
                    self._answer()
        except GreenletExit:
            seconds = time.perf_counter() - self._called
            self._recorder.unfinished(seconds, self._arrived, self._ttft_seconds)
            raise

    def _is_replay(self) -> bool:
        return self._rng.random() < self.settings.share_of_replays

    def _answer(self) -> None:
        prompt, tokens = self.session.prompts.draw(self._rng)
        call = self._generate(prompt, tokens or self.settings.answer_tokens)
        if call.status == "completed":
            self._records.append(call.record_id)

    def _turn(self) -> None:
        question, _ = Synthetic(self.settings.synthetic_tokens).draw(self._rng)
        messages = [*self._conversation, Message(role="user", content=str(question))]
        call = self._generate(messages, self.settings.answer_tokens)
        if call.status == "completed":
            messages.append(Message(role="assistant", content=call.text))
            over = len(messages) >= 2 * self.settings.conversation_turns
            self._conversation = [] if over else messages
        elif call.status == "failed":  # perhaps for its length: it would fail again and again
            self._conversation = []

    def _generate(self, prompt: Prompt, max_new_tokens: int) -> calls.Generated:
        settings = self.settings
        call = calls.generate(
            self._client,
            prompt,
            max_new_tokens,
            settings.call_timeout,
            settings.call_options(),
            self._count,
        )
        self._recorder.generated(call)
        self._set_pause(call)
        return call

    def _count(self, tokens: int) -> None:
        if self._ttft_seconds is None:
            self._ttft_seconds = time.perf_counter() - self._called
        self._arrived += tokens

    def _replay(self) -> None:
        record = self._rng.choice(self._records)
        call = calls.replay(self._client, record, self.settings.call_timeout)
        self._recorder.replayed(call)
        self._set_pause(call)

    def _set_pause(self, call: calls.Generated | calls.Replayed) -> None:
        pause = 0.0
        if call.status == "rejected" and self._is_noisy:
            pause = _NOISY_SECONDS
        elif call.status in ("rejected", "failed"):
            pause = _BACK_OFF_SECONDS if call.retry_seconds is None else call.retry_seconds
        self._pause = max(pause, self.settings.think_seconds)

    @property
    def _is_noisy(self) -> bool:
        return self.tenant.noisy and self.settings.scenario == "noisy-neighbour"
