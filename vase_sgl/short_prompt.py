"""Which prompts are short: workers and gateways keep long ones apart from them at the tokenizer."""

from __future__ import annotations

#: Workers count characters, gateways bytes, so what is short to a gateway is short to its workers.
#: Such a text takes a tokenizer a fraction of a second; megabytes take it half a minute.
SHORT_PROMPT = 2**16
