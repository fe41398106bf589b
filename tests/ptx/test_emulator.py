"""The emulator itself: that it computes what PTX says, and that it can fail.

A kernel that is wrong must be seen to be wrong: here some are, by a barrier, a wait or an
instruction that is not the one Triton wrote.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ptx import launcher as module
from tests.ptx.arithmetic import operation
from tests.ptx.launcher import Launcher, executed_ptx
from tests.ptx.memory import BadAccess
from tests.ptx.program import UnknownPTX, parse
from tests.ptx.test_kernels import check_against_reference
from tests.triton.test_evict import STEADY


@triton.jit
def exchange_kernel(data, out, BARRIER: tl.constexpr, N: tl.constexpr):
    """What another thread has written to global memory is read."""
    at = tl.arange(0, N)
    tl.store(data + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, tl.load(data + N - 1 - at))


@triton.jit
def same_place_kernel(out, value):
    """Every program writes the same element."""
    tl.store(out, tl.program_id(0) * value)


@triton.jit
def shifted_kernel(out, offset, N: tl.constexpr):
    tl.store(out + offset + tl.arange(0, N), 1.0)


@triton.jit
def total_kernel(data, out, N: tl.constexpr):
    """The warps' sums meet in shared memory."""
    tl.store(out, tl.sum(tl.load(data + tl.arange(0, N))))


@triton.jit
def product_kernel(a, b, out, DEPTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr):
    """out [N, N] = a [N, DEPTH] b [N, DEPTH]^T, by blocks of the depth that are copied ahead."""
    row, k = tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([N, N], tl.float32)
    for start in range(0, DEPTH, BLOCK):
        at = row[:, None] * DEPTH + start + k[None, :]
        total = tl.dot(tl.load(a + at), tl.trans(tl.load(b + at)), total)
    tl.store(out + row[:, None] * N + row[None, :], total)


def rewrite(monkeypatch: pytest.MonkeyPatch, pattern: str, other: str) -> None:
    """Kernels that are launched from now on have other PTX than Triton wrote."""
    monkeypatch.setattr(module, "parse", lambda ptx: parse(re.sub(pattern, other, ptx)))
    monkeypatch.setattr(Launcher, "_compiled", {})


@pytest.mark.parametrize("barrier", [True, False])
def test_a_race_in_global_memory(barrier: bool) -> None:
    with executed_ptx() as launcher:
        out = torch.zeros(128, dtype=torch.int32)
        exchange_kernel[(1,)](torch.zeros_like(out), out, BARRIER=barrier, N=128)
    races = [str(race) for race in launcher.races]
    if barrier:
        assert out.tolist() == [*range(127, -1, -1)] and not races
    else:
        assert len(races) == 1
        assert "exchange_kernel: two threads without order at global address" in races[0]
        assert "ld.global" in races[0]


def test_what_a_race_does_is_seen_where_one_warp_runs_ahead() -> None:
    outs = []
    for seed in range(4):
        with executed_ptx(np.random.default_rng(seed)) as launcher:
            outs.append(torch.zeros(128, dtype=torch.int32))
            exchange_kernel[(1,)](torch.zeros(128).int(), outs[-1], BARRIER=False, N=128)
        assert launcher.races
    assert any(out.tolist() != [*range(127, -1, -1)] for out in outs)


def test_a_race_of_programs() -> None:
    with executed_ptx() as launcher:
        same_place_kernel[(2,)](torch.zeros(1, dtype=torch.int32), 3)
        (race,) = launcher.races
        assert "two programs without order" in str(race) and race.role == "write"
        same_place_kernel[(2,)](torch.zeros(1, dtype=torch.int32), 0)  # the same value
        assert len(launcher.races) == 1


def test_a_barrier_that_is_missing_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = torch.arange(512), torch.zeros(1, dtype=torch.int64)
    with executed_ptx() as launcher:
        total_kernel[(1,)](data, out, N=512)
        assert out.item() == 511 * 256 and not launcher.races
        rewrite(monkeypatch, r"bar\.sync\s+0;", "")
        total_kernel[(1,)](data, out, N=512)
    assert {race.space for race in launcher.races} == {"shared"}


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r"mul\.hi\.u32", "mul.lo.u32"),  # other random numbers
        (r"setp\.lt\.s32", "setp.le.s32"),  # one more of everything
        (r"add\.s64", "sub.s64"),  # somewhere else
    ],
)
def test_a_wrong_instruction_is_seen_in_a_whole_round(
    pattern: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with executed_ptx():
        check_against_reference("random", STEADY, layers=1, heads=1)
        rewrite(monkeypatch, pattern, other)
        with pytest.raises((AssertionError, BadAccess)):
            check_against_reference("random", STEADY, layers=1, heads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "warps"), [(64, 4), (16, 4), (128, 8)])
def test_products(dtype: torch.dtype, size: int, warps: int, launcher: Launcher) -> None:
    """Of small integers, which every step holds exactly: any order of the sum gives this one."""
    a, b = products_of(dtype, size)
    out = torch.empty(size, size)
    product_kernel[(1,)](a, b, out, DEPTH=128, BLOCK=32, N=size, num_warps=warps)
    assert torch.equal(out, a.float() @ b.float().T)


def products_of(dtype: torch.dtype, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(size)
    a, b = (torch.randint(-8, 9, (size, 128), generator=g).to(dtype) for _ in range(2))
    return a, b


@pytest.mark.parametrize("pattern", [r"cp\.async\.wait_group\s+\d;", r"bar\.sync\s+0;"])
def test_a_block_that_is_read_before_it_is_there(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = products_of(torch.bfloat16, 64)
    out = torch.empty(64, 64)
    rewrite(monkeypatch, pattern, "")
    with executed_ptx() as launcher:
        product_kernel[(1,)](a, b, out, DEPTH=128, BLOCK=32, N=64)
    assert launcher.races or not torch.equal(out, a.float() @ b.float().T)


def test_memory_that_nobody_passed_is_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    with executed_ptx():
        held = torch.zeros(1024)
        out = held[256:768]
        shifted_kernel[(1,)](out, 256, N=256)
        assert held[512:768].eq(1).all()
        for offset in (-1, 257):
            with pytest.raises(BadAccess, match=r"shifted_kernel, line \d+: outside of global"):
                shifted_kernel[(1,)](out, offset, N=256)
        assert held.sum() == 256
        rewrite(monkeypatch, r"mad\.wide\.s32(.*), 4,", r"mad.wide.s32\1, 2,")
        with pytest.raises(BadAccess, match=r"not aligned to its \d+ bytes"):
            shifted_kernel[(1,)](out, 3, N=256)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("vote.sync.ballot.b32 %r1, %p1, -1;", "unknown instruction: vote.sync"),
        ("add.rz.f32 %r1, %r1, %r1;", "unknown instruction: add.rz"),
        ("add.s32 %r1, %r1, %clock;", "unknown operand %clock"),
        ("add.s32 %r1, %r1, %rd1;", "%rd1 has 64 bits, s32 has 32"),
        ("add.s32 %r1, %r1;", "2 operands"),
        ("st.global.b32 [%rd1+%rd1], %r1;", "unknown address"),
        ("shfl.sync.bfly.b32 %r1, %r1, 1, 7183, -1;", "a shuffle within parts of a warp"),
        ("bar.sync 1, 64;", "unknown instruction: bar.sync"),
        ("bra $elsewhere;", "unknown label"),
        ("call foo;", "unknown instruction: call"),
    ],
)
def test_what_is_not_modelled_is_an_error_that_names_the_line(line: str, message: str) -> None:
    registers = ".reg .pred %p<2>;\n.reg .b32 %r<2>;\n.reg .b64 %rd<2>;"
    text = f".visible .entry k()\n.reqntid 32\n{{\n{registers}\nret;\n{line}\n}}"
    with pytest.raises(UnknownPTX, match=f"^line 8: {re.escape(message)}"):
        program = parse(text)
        for x in program.instructions:
            module.decode(program, x)


def compute(opcode: str, *operands: np.ndarray[Any, Any]) -> torch.Tensor:
    found = operation(opcode)
    assert found is not None
    with np.errstate(all="ignore"):
        return torch.from_numpy(found.compute(*operands))


def test_a_fused_product_is_rounded_once() -> None:
    # The product is 1 + 2**-11 + 2**-24, half of a unit over a float32: the addend decides.
    x, tiny = np.float32([1 + 2**-12, 1 + 2**-12]), np.float32([2**-80, -(2**-80)])
    got = compute("fma.rn.f32", x, x, tiny).tolist()
    assert got == [1 + 2**-11 + 2**-23, 1 + 2**-11]


def test_conversions_are_those_of_torch() -> None:
    bits = torch.arange(2**16).to(torch.int16)
    g = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (4096,), generator=g).int().view(torch.float32)
    numbers = numbers[~numbers.isnan()]
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = compute(f"cvt.rn.{name}.f32", numbers.numpy())
        assert torch.equal(got.view(torch.int16), numbers.to(dtype).view(torch.int16))
    pairs = bits.numpy().view(np.uint16)
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        halves = compute(f"cvt.rn.f16x2.{name}x2", pairs).view(torch.float16)
        expected = bits.view(torch.uint8).view(dtype).to(torch.float16)
        assert torch.equal(halves.nan_to_num(7), expected.nan_to_num(7))
        assert torch.equal(halves.isnan(), expected.isnan())


def test_numbers_at_the_edges() -> None:
    zeros = np.float32([0.0, -0.0]), np.float32([-0.0, 0.0])
    assert compute("max.f32", *zeros).signbit().tolist() == [False, False]
    assert compute("min.f32", *zeros).signbit().tolist() == [True, True]
    infinity = np.float32([np.inf])
    nan = compute("sub.f32", infinity, infinity)
    assert nan.view(torch.int32).tolist() == [0x7FFFFFFF]
    assert compute("max.f32", nan.numpy(), infinity).tolist() == [np.inf]
    for pair in ((nan.numpy(), infinity), (infinity, -nan.numpy())):
        assert compute("max.NaN.f32", *pair).view(torch.int32).tolist() == [0x7FFFFFFF]
    assert compute("max.NaN.f32", *zeros).signbit().tolist() == [False, False]
    assert compute("setp.ne.f32", nan.numpy(), nan.numpy()).tolist() == [False]
    subnormal, one = np.float32([1e-40]), np.float32([1])
    assert compute("mul.f32", subnormal, one).tolist() == subnormal.tolist()
    assert compute("fma.rn.ftz.f32", subnormal, one, subnormal).tolist() == [0.0]
    assert compute("cvt.rzi.s32.f32", np.float32([-1.9, 3e9, np.nan])).tolist() == [
        *(-1, 2**31 - 1, 0)
    ]
    low = np.array([-7], np.int64)
    assert compute("mul.hi.s64", low, np.array([2**62])).tolist() == [-2]
    assert compute("rem.s32", np.int32([-7]), np.int32([4])).tolist() == [-3]
    assert compute("shr.s32", np.int32([-8]), np.uint32([40])).tolist() == [-1]
    assert compute("bfe.s32", np.int32([0b1100]), np.uint32([2]), np.uint32([2])).tolist() == [-1]
