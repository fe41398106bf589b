"""What the CPU platform adds: batch-invariant layers, seeded sampling, two workarounds."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from sglang.srt.layers import activation
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils.async_probe import sanitize_nan_logits

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import (
    device,
    linear_cpu,
    platform_cpu,
    sampling_cpu,
    server,
    torchvision_cpu,
)


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (576, 960), (1536, 576)])
    @pytest.mark.parametrize(
        "tile", [linear_cpu.ROW, linear_cpu.DECODE_TILE, linear_cpu.EXTEND_TILE]
    )
    def test_a_row_is_the_same_in_any_batch(
        self, dtype: torch.dtype, inputs: int, outputs: int, tile: int, threads: int
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        x = torch.randn(150, inputs, generator=generator).to(dtype)

        def linear(part: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(part, weight)

        tiling = linear_cpu.tiling(linear, inputs, dtype, tile)
        whole = linear_cpu.in_tiles(linear, x, *tiling)
        torch.testing.assert_close(whole, linear(x), rtol=2e-2, atol=1e-3)
        for start in (0, 1, 15, 70):
            for rows in (1, 2, 3, 7, 16, 17, 33, 64, 65):
                part = linear_cpu.in_tiles(linear, x[start : start + rows], *tiling)
                assert torch.equal(part, whole[start : start + rows]), tiling

    @pytest.mark.parametrize("fast", [False, True])
    @pytest.mark.parametrize("extending", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_layer_is_the_same_in_any_batch_on_every_cpu(
        self, dtype: torch.dtype, extending: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With products as a CPU with kernels for the type has them, and as one without."""
        monkeypatch.setattr(linear_cpu, "has_fast_products", lambda _: fast)
        monkeypatch.setattr(linear_cpu, "_extending", extending)
        monkeypatch.setattr(linear_cpu, "_trials", {})
        generator = torch.Generator().manual_seed(3)
        layer = torch.nn.Linear(576, 320, dtype=dtype).requires_grad_(False)
        heights = []

        def apply(method: object, layer: torch.nn.Linear, x: torch.Tensor, bias: torch.Tensor):
            heights.append(len(x))
            return torch.nn.functional.linear(x, layer.weight, bias)

        def run(x: torch.Tensor) -> torch.Tensor:
            return linear_cpu.tiled_linear_apply(apply, None, layer, x, layer.bias)

        x = torch.randn(70, 576, generator=generator).to(dtype)
        whole = run(x)
        assert whole.dtype == dtype
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        torch.testing.assert_close(whole.double(), exact, rtol=2e-2, atol=2e-2)
        for start, rows in ((0, 1), (1, 1), (3, 5), (0, 16), (20, 50)):
            assert torch.equal(run(x[start : start + rows]), whole[start : start + rows])
        if extending and not fast:
            assert not heights, "products in float32 are not upstream's"
        else:
            assert min(heights) == (64 if extending else 16 if fast else 1)

    def test_float32_products_are_fast_everywhere(self) -> None:
        assert linear_cpu.has_fast_products(torch.float32)
        assert linear_cpu.arithmetic(torch.float32) == "16-64-float32"

    def test_a_cpu_without_kernels_goes_row_by_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        has_kernels = linear_cpu.has_fast_products.__wrapped__
        assert not has_kernels(torch.bfloat16) and not has_kernels(torch.float16)
        monkeypatch.setattr(linear_cpu, "has_fast_products", has_kernels)
        assert linear_cpu.arithmetic(torch.bfloat16) == "1-64-float32"

    @pytest.mark.parametrize("fast", [False, True])
    def test_slow_products_are_told(
        self, fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(linear_cpu, "has_fast_products", lambda _: fast)
        linear_cpu.warn_of_slow_products(torch.bfloat16)
        assert ("for bfloat16" in caplog.text and "--dtype float32" in caplog.text) is not fast

    @pytest.mark.parametrize(("most", "at_once"), [(16, 1), (32, 2), (64, 4)])
    def test_a_product_whose_bits_depend_on_the_height_is_done_tile_by_tile(
        self, most: int, at_once: int
    ) -> None:
        def linear(part: torch.Tensor) -> torch.Tensor:
            return part * (1 if len(part) <= most else 1 + 2**-20)

        assert linear_cpu.tiling(linear, 8, torch.float32, 16) == (16, at_once)

    def test_four_tiles_go_at_once_only_where_two_may(self) -> None:
        """What is left of a batch goes two at a time."""

        def linear(part: torch.Tensor) -> torch.Tensor:
            return part * (1 + 2**-20 if len(part) == 32 else 1)

        assert linear_cpu.tiling(linear, 8, torch.float32, 16) == (16, 1)

    @pytest.mark.parametrize(("share", "height"), [(16, 8), (5, 4), (3, 2), (2, 1)])
    def test_a_product_whose_bits_depend_on_the_place_has_lower_tiles(
        self, share: int, height: int
    ) -> None:
        """As where threads take `share` rows each, the last of which is for another kernel."""

        def linear(part: torch.Tensor) -> torch.Tensor:
            others = torch.arange(len(part)) % share == share - 1
            return part * torch.where(others, 1 + 2**-20, 1)[:, None]

        assert linear_cpu.tiling(linear, 8, torch.float32, 16) == (height, 1)

    def test_a_difference_that_rounding_nearly_hides_is_found(self) -> None:
        def linear(part: torch.Tensor) -> torch.Tensor:
            return part if len(part) == 1 else torch.where(part > 4, part + 1, part)

        assert linear_cpu.tiling(linear, 8, torch.bfloat16, linear_cpu.ROW) == (1, 1)

    @pytest.mark.parametrize("rows", [0, 1, 16, 40, 64, 65, 112, 150])
    def test_every_row_once_and_in_order(self, rows: int) -> None:
        heights = []

        def linear(part: torch.Tensor) -> torch.Tensor:
            heights.append(len(part))
            return part + 1

        x = torch.arange(rows * 2.0).view(rows, 2)
        assert torch.equal(linear_cpu.in_tiles(linear, x, 16, 4), x + 1)
        assert set(heights) <= {0, 16, 32, 64}

    def test_an_empty_batch(self) -> None:
        empty = linear_cpu.in_tiles(lambda part: part @ torch.ones(4, 3), torch.ones(0, 4), 16)
        assert empty.shape == (0, 3)


class TestActivation:
    #: Name to a function and to inputs a feature.
    functions: ClassVar = {
        "silu and mul": (activation.SiluAndMul, 2),
        "gelu and mul": (lambda: activation.GeluAndMul("none"), 2),
        "gelu tanh and mul": (activation.GeluAndMul, 2),
        "gelu": (lambda: activation.get_act_fn("gelu"), 1),
        "gelu tanh": (lambda: activation.get_act_fn("gelu_pytorch_tanh"), 1),
        "new gelu": (lambda: activation.get_act_fn("gelu_new"), 1),
    }

    @pytest.mark.parametrize("threads", [1, 2, 3, 5, 8], indirect=True)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", functions)
    def test_a_row_is_the_same_in_any_batch(
        self, name: str, dtype: torch.dtype, threads: int
    ) -> None:
        make, inputs = self.functions[name]
        function = make()
        generator = torch.Generator().manual_seed(4)
        for features in (100, 1536, 9728, 14336, 18944):
            x = torch.randn(100, inputs * features, generator=generator).mul(3).to(dtype)
            alone = torch.cat([function(row[None]) for row in x])
            for start, end in ((0, 2), (1, 4), (0, 7), (3, 19), (0, 33), (0, 64), (1, 100)):
                assert torch.equal(function(x[start:end]), alone[start:end]), features

    def test_shapes_stay(self) -> None:
        x = torch.randn(3, 40, 600)
        gate, up = x.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(activation.SiluAndMul()(x), expected)
        assert activation.SiluAndMul()(x[:0]).shape == (0, 40, 300)

    def test_shared_modules_are_wrapped_once(self) -> None:
        forward = activation.get_act_fn("gelu").forward
        assert activation.get_act_fn("gelu").forward is forward


class TestNothingElseToFix:
    """Operations that go to torch whole, because they already treat rows alike."""

    @pytest.mark.parametrize("threads", [1, 2, 3, 5, 8], indirect=True)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("width", "name"),
        [(576, "norm"), (5120, "norm"), (49152, "softmax"), (49152, "log softmax"), (49152, "cap")],
    )
    def test_a_row_is_the_same_in_any_batch(
        self, width: int, name: str, dtype: torch.dtype, threads: int
    ) -> None:
        functions = {
            "norm": RMSNorm(width).to(dtype).forward_native,
            "softmax": lambda x: torch.softmax(x.float(), -1),
            "log softmax": lambda x: torch.log_softmax(x.float(), -1),
            "cap": lambda x: 30 * torch.tanh(x / 30),
        }
        function = functions[name]
        x = torch.randn(40, width, generator=torch.Generator().manual_seed(5)).mul(3).to(dtype)
        alone = torch.cat([function(row[None]) for row in x])
        for start, end in ((0, 2), (1, 4), (0, 7), (3, 19), (0, 33), (1, 40)):
            assert torch.equal(function(x[start:end]), alone[start:end])


def _draw(probs: torch.Tensor, seeds: range, **limits: float) -> torch.Tensor:
    rows = len(seeds)
    return sampling_cpu.draw(
        probs.expand(rows, -1),
        torch.tensor(list(seeds)),
        torch.full((rows,), 5),
        top_k=torch.full((rows,), int(limits.get("top_k", 1 << 30))),
        top_p=torch.full((rows,), limits.get("top_p", 1.0)),
        min_p=torch.full((rows,), limits.get("min_p", 0.0)),
    )


class TestSampling:
    probs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])

    def test_frequencies_follow_the_probabilities(self) -> None:
        from scipy.stats import chisquare

        counts = torch.bincount(_draw(self.probs, range(4000)), minlength=5)
        assert chisquare(counts, 4000 * self.probs).pvalue > 0.01

    @pytest.mark.parametrize(
        ("limits", "allowed"),
        [
            ({"top_k": 2}, {1, 3}),
            ({"top_k": 1}, {1}),
            ({"top_p": 0.5}, {1, 3}),
            ({"top_p": 0.39}, {1}),
            ({"min_p": 0.5}, {1, 3, 4}),
            ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, {1, 3, 4}),
        ],
    )
    def test_limits_keep_the_likeliest_tokens(
        self, limits: dict[str, float], allowed: set[int]
    ) -> None:
        assert set(_draw(self.probs, range(500), **limits).tolist()) == allowed

    def test_a_token_without_probability_is_never_drawn(self) -> None:
        probs = torch.tensor([0.0, 0.5, 0.0, 0.5])
        assert set(_draw(probs, range(500)).tolist()) == {1, 3}

    def test_a_row_of_no_probabilities_has_a_token(self) -> None:
        probs = torch.tensor([0.5, float("nan"), 0.5, float("nan")])
        assert set(_draw(probs, range(9), top_p=0.9, min_p=0.1).tolist()) == {int(probs.argmax())}

    @pytest.mark.parametrize("seed", [None, 7])
    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    def test_infinite_logits_end_no_worker(
        self,
        stepped: SteppedScheduler,
        monkeypatch: pytest.MonkeyPatch,
        top_p: float,
        seed: int | None,
    ) -> None:
        """As a model in half precision may have them; here by a penalty that no client may send."""
        monkeypatch.setenv(server.SANITIZE_LOGITS, "1")  # as `vase-sgl worker` does
        stepped.answers.clear()
        with torch.inference_mode():
            for rid, penalty in (("bad", 1e-40), ("good", 1.0)):
                stepped.submit(
                    rid,
                    [5, 6, 7],
                    max_new_tokens=12,
                    temperature=1.0,
                    repetition_penalty=penalty,
                    sampling_seed=seed,
                    top_p=top_p,
                )
            stepped.run()
        assert [len(stepped.answers[rid].tokens) for rid in ("bad", "good")] == [12, 12]

    def test_finite_logits_keep_their_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(server.SANITIZE_LOGITS, "1")
        logits = torch.randn(4, 1000) * torch.logspace(-30, 30, 1000)
        logits[:, ::7] = -torch.inf  # as a grammar masks
        sanitized = logits.clone()
        sanitize_nan_logits(sanitized)
        assert torch.equal(sanitized[logits.isfinite()], logits[logits.isfinite()])
        assert torch.equal(sanitized.softmax(-1), logits.softmax(-1))

    @pytest.mark.parametrize("top_k", [4, 1 << 30])
    def test_the_mask_is_told_with_the_seeded_token(
        self, stepped: SteppedScheduler, top_k: int
    ) -> None:
        """`return_sampling_mask`: the logprob belongs to the token that was answered."""
        rows = 64
        sampler = stepped.scheduler.tp_worker.model_runner.sampler
        info = SamplingBatchInfo(
            temperatures=torch.ones(rows, 1),
            top_ps=torch.ones(rows),
            top_ks=torch.full((rows,), top_k),
            min_ps=torch.zeros(rows),
            is_all_greedy=False,
            is_any_greedy=False,
            need_top_p_sampling=False,
            need_top_k_sampling=top_k == 4,
            need_min_p_sampling=False,
            vocab_size=5,
            sampling_seed=torch.tensor([(1, seed) for seed in range(rows)]),
            sampling_mask_batch_indices=torch.arange(rows),
        )
        probs = self.probs.repeat(rows, 1)
        tokens, capture = sampler._sample_from_probs(
            probs.clone(), info, torch.arange(rows), top_k > 4
        )
        told = sampler._build_sampling_mask_output(tokens, capture, None)
        kept = probs.masked_fill(probs < 0.1, 0) if top_k == 4 else probs
        expected = (kept / kept.sum(1, keepdim=True)).gather(1, tokens.long()[:, None])[:, 0].log()
        torch.testing.assert_close(told.selected_logprobs, expected)

    def test_position_and_seed_key_the_draw(self) -> None:
        uniforms = sampling_cpu._uniforms(
            torch.tensor([1, 1, 2, 2**62]), torch.tensor([10, 11, 10, 10])
        )
        assert len(uniforms.unique()) == 4
        assert ((uniforms >= 0) & (uniforms < 1)).all()


class TestPlatform:
    def test_it_is_the_active_one(self) -> None:
        assert type(current_platform).__name__ == "PlainCpuPlatform"
        assert current_platform.get_default_attention_backend() == "torch_native"

    def test_it_leaves_a_gpu_machine_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert platform_cpu.activate() is not None
        monkeypatch.setattr(device, "has_accelerator", lambda: True)
        assert platform_cpu.activate() is None

    def test_the_build_of_torch_tells_as_torch_itself_does(self) -> None:
        assert device.has_accelerator() == torch.accelerator.is_available()

    def test_it_leaves_sglangs_own_cpu_engine_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        assert platform_cpu.activate() is None


class TestTorchvision:
    def test_the_workaround_is_needed_here_and_works(self) -> None:
        """Without it in a process of its own; with it here, where SGLang has been imported."""
        bare = [sys.executable, "-c", "import torchvision"]
        done = subprocess.run(bare, capture_output=True, text=True)
        assert "operator torchvision::nms does not exist" in done.stderr
        assert torchvision_cpu.declare_torchvision_operators()  # again: once is enough
        assert sys.modules["torchvision"].__version__

    def test_a_matching_pair_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torchvision_cpu, "_library", None)
        monkeypatch.setattr(torchvision_cpu, "_torchvision_is_cuda_build", lambda: False)
        assert not torchvision_cpu.declare_torchvision_operators()
        monkeypatch.setattr(torchvision_cpu, "_torchvision_is_cuda_build", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert not torchvision_cpu.declare_torchvision_operators()
