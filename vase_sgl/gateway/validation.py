"""What a Generate request asks for, checked at the edge. Texts name the field and the cure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from vase_sgl.eviction import EvictionLimits, EvictionParams, ParameterError
from vase_sgl.eviction.params import MAX_SEED
from vase_sgl.gateway.errors import InvalidRequest, PermissionDenied
from vase_sgl.gateway.need import BESIDE_PROMPT, Need
from vase_sgl.gateway.tenants import Role, Tenant
from vase_sgl.gateway.wire import PROMPT_MODES
from vase_sgl.gateway.workers import WorkerInfo
from vase_sgl.rpc.v1 import gateway_pb2 as pb

#: Bytes of text that a token stands for, at most: the longest of the vocabularies in wide use are
#: runs of 128 blanks. Longer text has too many tokens, and a worker would take long to count them.
MAX_BYTES_PER_TOKEN = 128
#: Bytes of a request beside its prompt: stop strings take most of them.
_OTHER_BYTES = 2**16
#: Messages of a chat, and over HTTP parts of messages with them: a small one takes many times its
#: bytes, and long to look at.
MAX_CHAT_MESSAGES = 8192
#: Who may speak in a chat.
ROLES = ("system", "user", "assistant")
MAX_STOP_STRINGS = 16
#: With each chunk the end of the text is compared with all that a stop string may begin with.
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
#: Smaller ones may overflow a logit.
MIN_REPETITION_PENALTY = 0.01

InputKind = Literal["text", "token_ids", "chat"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt in the form it came; only the field that `kind` names is filled."""

    kind: InputKind
    text: str = ""
    token_ids: tuple[int, ...] = ()
    chat: tuple[Mapping[str, str], ...] = ()


def require(condition: bool, message: str) -> None:
    """Raise `InvalidRequest(message)` unless `condition` holds."""
    if not condition:
        raise InvalidRequest(message)


def check_message_bytes(size: int, tenant: Tenant | None) -> None:
    """A message or body is no longer than its sender can need; before it is parsed.

    None: of a stranger, who sends no prompts.
    """
    tokens = 0 if tenant is None else tenant.limits.max_prompt_tokens
    most = tokens * MAX_BYTES_PER_TOKEN + _OTHER_BYTES
    if size > most:
        why = (
            "" if tenant is None else f", enough for tenant {tenant.name}'s {tokens} prompt tokens"
        )
        raise InvalidRequest(f"the request is larger than {most} bytes{why}; shorten it")


def prompt_of(request: pb.GenerateRequest, tenant: Tenant) -> Prompt:
    """The prompt, which is not empty; of token ids no more than the tenant may send."""
    match request.WhichOneof("input"):
        case "text":
            require(request.text != "", "text: the prompt is empty; send at least one character")
            return Prompt("text", text=request.text)
        case "token_ids":
            # First: millions of ids would take long to look at.
            _check_count(len(request.token_ids.ids), tenant)
            ids = tuple(request.token_ids.ids)
            require(len(ids) > 0, "token_ids: the prompt is empty; send at least one token id")
            require(min(ids) >= 0, "token_ids: a token id is negative; ids start at 0")
            return Prompt("token_ids", token_ids=ids)
        case "chat":
            messages = request.chat.messages
            check_messages("chat.messages", len(messages))
            require(len(messages) > 0, "chat: the conversation is empty; send a message")
            for index, message in enumerate(messages):
                # Templates leave out what another one says, and do not tell.
                if message.role not in ROLES:
                    raise InvalidRequest(
                        f"chat.messages[{index}].role: must be system, user or assistant"
                    )
            chat = tuple({"role": m.role, "content": m.content} for m in messages)
            return Prompt("chat", chat=chat)
        case _:
            raise InvalidRequest("input: no prompt; set one of text, token_ids and chat")


def check_messages(field: str, count: int) -> None:
    """A chat has no more messages, their parts included, than are looked at."""
    require(
        count <= MAX_CHAT_MESSAGES,
        f"{field}: {count} messages and parts of messages are too many; send at most "
        f"{MAX_CHAT_MESSAGES}",
    )


def prompt_bytes(prompt: Prompt) -> int:
    """Bytes of a text or chat in UTF-8."""
    chat = sum(len(text.encode()) for message in prompt.chat for text in message.values())
    return len(prompt.text.encode()) + chat


def check_prompt_bytes(prompt: Prompt, tenant: Tenant, info: WorkerInfo) -> None:
    """A text or chat is no longer than as many tokens as may be can be; before it is tokenized."""
    size = prompt_bytes(prompt)
    tokens, owner = min(
        (tenant.limits.max_prompt_tokens, f"the ceiling of tenant {tenant.name}"),
        (info.context_length, "the model's context length"),
    )
    require(
        size <= tokens * MAX_BYTES_PER_TOKEN,
        f"input: the prompt has {size} bytes, more than {tokens} tokens, {owner}, can have; "
        "shorten it",
    )


def check_prompt_tokens(
    kind: InputKind, token_ids: tuple[int, ...], tenant: Tenant, info: WorkerInfo
) -> None:
    """The tokenized prompt fits the tenant's limit, the vocabulary and the context, of which SGLang
    wants a prompt to leave some."""
    count = len(token_ids)
    require(count > 0, "input: the prompt has no tokens; send a longer one")
    _check_count(count, tenant)
    if kind == "token_ids":
        _check_vocabulary(token_ids, info.vocab_size)
    longest = info.context_length - BESIDE_PROMPT
    require(
        count <= longest,
        f"input: the prompt has {count} tokens, which leaves no room for an answer in the model's "
        f"context length of {info.context_length} tokens; shorten it to {longest}",
    )


def within_context(max_new_tokens: int, prompt_tokens: int, info: WorkerInfo, *, clip: bool) -> int:
    """max_new_tokens, within the room that a prompt which fits leaves in the context.

    clip: more than that is brought down to it, not refused.
    """
    room = info.context_length - prompt_tokens
    if clip:
        return min(max_new_tokens, room)
    require(
        max_new_tokens <= room,
        f"max_new_tokens: prompt ({prompt_tokens}) and output ({max_new_tokens}) exceed the "
        f"model's context length of {info.context_length} tokens; ask for at most {room} or "
        "shorten the prompt",
    )
    return max_new_tokens


def check_slots(need: Need, infos: Iterable[WorkerInfo]) -> None:
    """A worker could run it, if it had nothing else to do. Otherwise it would wait for one."""
    excess = min(need.excess_slots(info) for info in infos)
    cure = "shorten it" if need.eviction is None else "shorten it or lower the budget"
    require(
        excess <= 0,
        f"input: with this prompt of {len(need.prompt_token_ids)} tokens the request needs "
        f"{excess} KV slots more than a worker has; {cure}",
    )


def _check_count(count: int, tenant: Tenant) -> None:
    require(
        count <= tenant.limits.max_prompt_tokens,
        f"input: the prompt has {count} tokens, above the ceiling of tenant {tenant.name}, "
        f"{tenant.limits.max_prompt_tokens}; shorten it",
    )


def _check_vocabulary(token_ids: tuple[int, ...], vocab_size: int | None) -> None:
    """SGLang does not check: an id outside the vocabulary ends its scheduler."""
    if vocab_size is None:
        raise InvalidRequest(
            "token_ids: this worker does not report its vocabulary size, so ids cannot be checked; "
            "send text or a chat"
        )
    require(
        max(token_ids) < vocab_size,
        f"token_ids: {max(token_ids)} is no token of this model; ids end at {vocab_size - 1}",
    )


def check_seed(request: pb.GenerateRequest) -> None:
    """Seed and sample index are in range. The tenant's seed policy is checked elsewhere."""
    require(
        not request.HasField("seed") or 0 <= request.seed <= MAX_SEED,
        f"seed: must be from 0 to 2^63 - 1, got {request.seed}",
    )
    require(
        request.sample_index >= 0, f"sample_index: must not be negative, got {request.sample_index}"
    )


def max_new_tokens_of(request: pb.GenerateRequest, tenant: Tenant, *, clip: bool) -> int:
    """max_new_tokens, within the tenant's ceiling; `clip` as for `within_context`."""
    value = request.max_new_tokens
    if clip:
        value = min(value, tenant.limits.max_new_tokens)
    require(value >= 1, f"max_new_tokens: must be at least 1, got {value}")
    require(
        value <= tenant.limits.max_new_tokens,
        f"max_new_tokens: {value} is above the ceiling of tenant {tenant.name}, "
        f"{tenant.limits.max_new_tokens}; ask for less or have the ceiling raised",
    )
    return value


def sampling_of(params: pb.SamplingParams) -> dict[str, Any]:
    """SGLang's sampling parameters, complete, but for max_new_tokens and the seed."""

    given_fields = {field.name for field, _ in params.ListFields()}

    def value(name: str, default: float) -> float:
        given = getattr(params, name) if name in given_fields else default
        require(math.isfinite(given), f"sampling.{name}: must be a finite number, got {given}")
        return float(given)

    def between(name: str, default: float, low: float, high: float) -> float:
        given = value(name, default)
        require(
            low <= given <= high,
            f"sampling.{name}: must be from {low:g} to {high:g}, got {given:g}",
        )
        return given

    top_p = value("top_p", 1.0)
    require(0 < top_p <= 1, f"sampling.top_p: must be above 0 and at most 1, got {top_p:g}")
    top_k = params.top_k if "top_k" in given_fields else -1
    require(
        top_k == -1 or top_k >= 1, f"sampling.top_k: must be -1 (all) or at least 1, got {top_k}"
    )
    require(
        len(params.stop) <= MAX_STOP_STRINGS and "" not in params.stop,
        f"sampling.stop: send at most {MAX_STOP_STRINGS} strings, none of them empty",
    )
    require(
        all(len(stop) <= MAX_STOP_CHARACTERS for stop in params.stop),
        f"sampling.stop: a string may have {MAX_STOP_CHARACTERS} characters at most",
    )
    require(
        len(params.stop_token_ids) <= MAX_STOP_TOKENS
        and all(token >= 0 for token in params.stop_token_ids),
        f"sampling.stop_token_ids: send at most {MAX_STOP_TOKENS} ids, none of them negative",
    )
    require(
        not (params.stop_token_ids and params.ignore_eos),
        "sampling.stop_token_ids: workers that are told ignore_eos look at none of them; leave "
        "one of the two out, or use stop",
    )
    return {
        "temperature": between("temperature", 1.0, 0, 100),
        "top_p": top_p,
        "top_k": top_k,
        "min_p": between("min_p", 0.0, 0, 1),
        "repetition_penalty": between("repetition_penalty", 1.0, MIN_REPETITION_PENALTY, 2),
        "frequency_penalty": between("frequency_penalty", 0.0, -2, 2),
        "presence_penalty": between("presence_penalty", 0.0, -2, 2),
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
    }


def check_min_p(min_p: float, info: WorkerInfo) -> None:
    """The worker's sampler knows min_p: SGLang's draw by seed does not, our CPU platform's does."""
    by_seed = info.fingerprint.get("enable_deterministic_inference") == "True"
    require(
        min_p == 0 or not by_seed,
        "sampling.min_p: cannot be used with workers that run on a GPU with "
        "--enable-deterministic-inference; leave it out, or use top_p",
    )


def check_inspect(
    eviction: EvictionParams | None, *, tenant: Tenant, info: WorkerInfo, allowed: bool
) -> None:
    """A request may be inspected. `allowed`: by the gateway's configuration."""
    if not allowed:
        raise PermissionDenied(
            "inspect: this gateway does not allow it; leave it out, or have allow_inspect set"
        )
    if not tenant.has_role(Role.INSPECT):
        raise PermissionDenied(
            f"inspect: tenant {tenant.name} lacks the role `inspect`; whoever runs the gateway can "
            "add it in the tenants file"
        )
    require(
        eviction is not None,
        "inspect: without eviction everything is kept; set a budget or leave inspect out",
    )
    require(
        info.can_inspect,
        "inspect: the workers have no folder for it; start them with --vase-inspect-dir DIR, or "
        "leave inspect out",
    )


def eviction_fields(params: pb.EvictionParams) -> dict[str, Any]:
    """The fields that are set, as `EvictionParams.parse` names them."""
    fields = {
        field.name: value for field, value in params.ListFields() if field.name != "prompt_mode"
    }
    prompt = prompt_mode_of("eviction.prompt_mode", params.prompt_mode)
    return fields if prompt is None else {**fields, "prompt": prompt}


def prompt_mode_of(field: str, mode: int) -> str | None:
    """The prompt mode as `EvictionParams` names it; None if it is unspecified."""
    names: dict[int, str] = {number: name for name, number in PROMPT_MODES.items()}
    require(
        mode in names or mode == pb.PROMPT_MODE_UNSPECIFIED,
        f"{field}: unknown mode {mode}; use PROMPT_MODE_EVICT or PROMPT_MODE_KEEP",
    )
    return names.get(mode)


def eviction_of(
    fields: Mapping[str, Any] | None, *, seed: int, tenant: Tenant, info: WorkerInfo
) -> EvictionParams | None:
    """The validated eviction parameters, or None for a request without eviction."""
    allowed = tenant.limits.policies
    if fields is None:
        require(
            "full" in allowed,
            f"eviction: tenant {tenant.name} may not use a full cache; set a budget and a "
            f"policy of {', '.join(allowed)}",
        )
        return None
    ceiling, owner = min(
        (info.max_budget, "this server"),
        (tenant.limits.max_budget, f"tenant {tenant.name}"),
    )
    budget = fields.get("budget")
    require(
        budget is None or budget <= ceiling,
        f"eviction.budget: {budget} is above the ceiling of {owner}, {ceiling}; lower the budget "
        "or have the ceiling raised",
    )
    try:
        params = EvictionParams.parse(
            {**fields, "seed": seed},
            EvictionLimits(max_budget=info.max_budget, max_window=info.max_window),
        )
    except ParameterError as error:
        raise InvalidRequest(f"eviction: {error}") from error
    require(
        params.policy.name in allowed,
        f"eviction.policy: tenant {tenant.name} may not use {params.policy.name}; choose one of "
        f"{', '.join(allowed)}",
    )
    return params
