"""The page in a real headless Chromium: set VASE_TEST_BROWSER=1 (Debian's package `chromium`)."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.inspection.browser import Tab, browser, executable
from tests.inspection.samples import HOSTILE, byte_tokenizer, sample
from vase_sgl.inspection import Inspection
from vase_sgl.inspection.page import build_page
from vase_sgl.inspection.tokens import token_texts

pytestmark = pytest.mark.skipif(
    "VASE_TEST_BROWSER" not in os.environ,
    reason="opens a browser: install chromium and set VASE_TEST_BROWSER=1",
)

IDS = byte_tokenizer().encode(HOSTILE + " Words, so that there are some rounds.").ids


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    assert executable() is not None, "VASE_TEST_BROWSER is set, but there is no chromium"
    async with browser(tmp_path / "profile") as tab:
        yield tab
        assert tab.problems == []
        assert all(url.startswith("file:") for url in tab.requests) and len(tab.requests) == 1


def write(folder: Path, inspection: Inspection, texts: list[str | None] | None = None) -> Path:
    path = folder / "page.html"
    path.write_text(build_page(inspection, texts), "utf-8")
    return path


def keepers(inspection: Inspection, round: int) -> list[int]:
    """How many heads keep each token, from after this round to the next one."""
    table = inspection.evicted_in_round
    end = len(inspection.token_ids) - 1
    if round < inspection.rounds:
        end = int(inspection.round_lengths[round])
    kept = ((table == 0) | (table > round)).sum(axis=(0, 1))
    kept[end:] = 0
    return [int(count) for count in kept]


async def test_a_hostile_text_is_shown_and_does_nothing(tab: Tab, tmp_path: Path) -> None:
    texts = token_texts(byte_tokenizer(), [*IDS, 300])
    await tab.open(write(tmp_path, sample([*IDS, 300]), texts))
    assert await tab.evaluate("window.hacked") is None
    assert await tab.evaluate("document.images.length") == 0
    shown = await tab.evaluate("elements.map((e) => e.textContent).join('')")
    assert "</script><img src=x onerror='window.hacked=1'><!-- @SCRIPT@ ··\\u202e" in shown
    assert "'·é···🦑'⏎\n⇥\tend" in shown
    assert shown.endswith(" rounds.[300]")
    await tab.evaluate("moveTo(tokens - 1, -1)")
    await tab.until("byId('details').textContent.includes(', id 300, ')")
    assert "null" not in await tab.evaluate("byId('details').textContent")
    assert await tab.evaluate("document.title") == "Request sample"


async def test_what_cannot_be_seen_is_written_out(tab: Tab, tmp_path: Path) -> None:
    """Controls of direction, soft hyphens, fillers, tags: in the text and in the details."""
    hidden = "\u0007\u007f\u00ad\u061c\u115f\u180e\u200b\u202e\u2028\u3164\ufe0f\ufeff\U000e0041"
    codes = [f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\u{{{ord(c):x}}}" for c in hidden]
    texts = [f"<{c}>" for c in hidden] + ["é\t\n🦑"]
    await tab.open(write(tmp_path, sample([1] * len(texts)), [*texts]))
    shown = await tab.evaluate("elements.map((e) => e.textContent)")
    assert shown == [*(f"<{code}>" for code in codes), "é⇥\t⏎\n🦑"]
    for position, code in enumerate(codes):
        await tab.evaluate(f"describeToken({position}, -1)")
        details = await tab.evaluate("byId('details').textContent")
        assert details.startswith(f'Token {position} "<{code}>", id 1')


async def test_every_round_shows_who_keeps_what(tab: Tab, tmp_path: Path) -> None:
    """The slider by its keys; text and map in the colours of what the file says."""
    inspection = sample(IDS)
    await tab.open(write(tmp_path, inspection))
    await tab.evaluate("byId('round').focus()")
    await tab.press("Home")
    for number in range(inspection.rounds + 1):
        await tab.until(f"document.documentElement.dataset.round === '{number}'")
        assert await tab.evaluate("Array.from(keepers)") == keepers(inspection, number)
        text = await tab.evaluate("byId('state').textContent")
        seen = int(inspection.round_lengths[number]) if number < inspection.rounds else len(IDS) - 1
        when = "before the first round"
        if number:
            since = seen - int(inspection.round_lengths[number - 1])
            when = f"after round {number} of {inspection.rounds} and the {since} tokens since"
        mean = round(sum(keepers(inspection, number)) / 6)
        assert text.startswith(f"{when}: {seen} tokens seen; a head keeps {mean} of them ")
        colours = await tab.evaluate("elements.map((e) => e.style.backgroundColor)")
        wanted = await tab.evaluate(
            "Array.from(keepers, (n) => `rgb(${palette[level(n / 6)].join(', ')})`)"
        )
        assert colours[:seen] == wanted[:seen] and set(colours[seen:]) == {""}
        cells = await tab.evaluate("Array.from(count(tokens))")
        table = inspection.evicted_in_round
        shares = ((table == 0) | (table > number)).mean(axis=1)
        shares[:, seen:] = -1
        assert np.allclose(np.array(cells).reshape(shares.shape), shares)
        pixel = await tab.evaluate(
            "Array.from(map.getContext('2d').getImageData("
            "Math.floor(10.5 * map.width / tokens), Math.floor(1.5 * map.height / 3), 1, 1).data)"
        )
        assert pixel[:3] == await tab.evaluate(f"palette[level({shares[1, 10]})]")
        await tab.press("ArrowRight")


async def test_a_request_without_a_round_says_so(tab: Tab, tmp_path: Path) -> None:
    await tab.open(write(tmp_path, sample(IDS[:12])))
    assert await tab.evaluate("byId('round').disabled")
    text = await tab.evaluate("byId('state').textContent")
    assert text.startswith("there was no round: 11 tokens seen; a head keeps 11 of them (100 %)")


async def test_one_layer_and_one_head(tab: Tab, tmp_path: Path) -> None:
    inspection = sample(IDS)
    await tab.open(write(tmp_path, inspection))
    for name, value in (("layer", 2), ("head", 1)):
        await tab.evaluate(
            f"byId('{name}').value = '{value}'; byId('{name}').dispatchEvent(new Event('change'))"
        )
    await tab.until("Math.max(...keepers) === 1")
    kept = inspection.evicted_in_round[2, 1] == 0
    kept[-1] = False
    assert await tab.evaluate("Array.from(keepers)") == kept.astype(int).tolist()


async def test_keys_and_hover_tell_about_a_token(tab: Tab, tmp_path: Path) -> None:
    inspection = sample(IDS)
    await tab.open(write(tmp_path, inspection, token_texts(byte_tokenizer(), IDS)))
    await tab.evaluate("byId('map').focus()")
    for _ in range(3):
        await tab.press("ArrowRight")
    await tab.press("ArrowDown")
    await tab.until("/^Token 3 .*Layer 0 /s.test(byId('details').textContent)")
    details = await tab.evaluate("byId('details').textContent")
    rounds = inspection.evicted_in_round[0, :, 3].tolist()
    named = [f"head {h} {f'in round {r}' if r else 'never'}" for h, r in enumerate(rounds)]
    assert details.endswith(f"Layer 0 evicts it: {', '.join(named)}")
    await tab.evaluate("byId('text').focus()")
    await tab.press("End")
    await tab.until("byId('details').textContent.endsWith('it was never cached.')")
    await tab.evaluate("elements[30].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    await tab.until("byId('details').textContent.startsWith('Token 30 ')")


async def test_rounds_that_are_not_recorded_are_not_called_never(tab: Tab, tmp_path: Path) -> None:
    """A head that keeps a token in all recorded rounds may evict it in a later one."""
    recorded = 2
    everything = sample(IDS).evicted_in_round
    part = np.where(everything > recorded, np.uint16(0), everything)
    await tab.open(write(tmp_path, sample(IDS, recorded_rounds=recorded, evicted_in_round=part)))
    evicting = (part > 0).sum(axis=(0, 1))
    for count, sentence in (
        (0, r"No head evicts it in a recorded round\.\n"),
        (3, r"Evicted by 3 heads in round.*, in no recorded round by 3\.\n"),
    ):
        position = evicting.tolist().index(count)
        await tab.evaluate(f"moveTo({position}, 0)")
        await tab.until(f"byId('details').textContent.startsWith('Token {position},')")
        details = await tab.evaluate("byId('details').textContent")
        assert re.search(sentence, details), details
        rounds = part[0, :, position].tolist()
        named = [
            f"head {h} in {f'round {r}' if r else 'no recorded round'}"
            for h, r in enumerate(rounds)
        ]
        assert details.endswith(f"Layer 0 evicts it: {', '.join(named)}")


async def test_dark_and_light_can_both_be_read(tab: Tab, tmp_path: Path) -> None:
    """Every colour that a token has behind it against its text, by WCAG's contrast ratio."""
    page = write(tmp_path, sample(IDS))
    await tab.open(page, dark=True)
    contrast = """
    (() => {
      const light = (rgb) => rgb.map((c) => c / 255)
        .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const worst = (style, backs) => Math.min(...backs.map((back) => {
        const share = Number(style.opacity);
        const fore = numbers(style.color).map((c, i) => c * share + back[i] * (1 - share));
        const [a, b] = [light(fore), light(back)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      }));
      const behind = (element) => {
        const style = getComputedStyle(element);
        const hatch = style.backgroundImage.match(/rgb\\([^)]*\\)/g) ?? [];
        return [style, [numbers(getComputedStyle(document.body).backgroundColor),
          ...hatch.map(numbers)]];
      };
      return Math.min(
        worst(getComputedStyle(document.body), palette),
        worst(...behind(document.querySelector("#text i.later"))),
      );
    })()"""
    await tab.evaluate("view.round = 0; update()")
    await tab.until("document.querySelector('#text i.later') !== null")
    assert await tab.evaluate(contrast) >= 4.5
    await tab.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}]
    )
    await tab.until("palette[0][0] > 200")
    assert await tab.evaluate(contrast) >= 4.5


async def test_a_long_answer_is_coloured_in_part(tab: Tab, tmp_path: Path) -> None:
    """20,000 tokens, 500 rounds, 36 layers of 8 KV heads."""
    rng = np.random.default_rng(0)
    tokens, rounds = 20_000, 500
    inspection = sample(
        [1] * tokens,
        heads=np.arange(8, dtype=np.int32),
        total_heads=8,
        recorded_rounds=rounds,
        round_lengths=np.linspace(100, tokens - 1, rounds).astype(np.int32),
        evicted_in_round=rng.integers(0, rounds, (36, 8, tokens)).astype(np.uint16),
    )
    await tab.open(write(tmp_path, inspection))
    assert await tab.evaluate("visible.size") < await tab.evaluate("chunks.length") / 4
    await tab.evaluate("view.round = 250; update()")
    await tab.until("document.documentElement.dataset.round === '250'")
    assert await tab.evaluate("Array.from(keepers)") == keepers(inspection, 250)
    await tab.evaluate("moveTo(15000, 3)")
    await tab.until("visible.has(chunks[75]) && chunks[75].painted === updates")
