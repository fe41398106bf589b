"""SGLang's own step from a request as it came to the object that the scheduler is sent."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

#: Of sampling parameters and other fields of a request.
Create = Callable[..., Any]

_OF_CHARACTERS = SimpleNamespace(encode=lambda text, **_: list(text))


def creator(model_config: Any, tokenizer: Any = _OF_CHARACTERS) -> Create:
    """The step with the hooks on it; needs the plugin loaded."""
    manager = TokenizerManager.__new__(TokenizerManager)
    times = SimpleNamespace(set_tokenize_finish_time=lambda: None)
    manager.model_config = model_config
    manager.preferred_sampling_params = None
    manager.sampling_params_class = SamplingParams
    manager.tokenizer = tokenizer
    manager.rid_to_state = {"r": SimpleNamespace(time_stats=times)}

    def create(sampling: dict[str, Any], **fields: Any) -> Any:
        prompt = {} if "input_embeds" in fields else {"input_ids": [5, 6]}
        request = GenerateReqInput(rid="r", sampling_params=sampling, **prompt, **fields)
        request.normalize_batch_and_arguments()
        ids = array("q", request.input_ids) if prompt else None
        return manager._create_tokenized_object(request, None, ids, request.input_embeds)

    return create
