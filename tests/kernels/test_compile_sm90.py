"""Every kernel compiles for sm_90 within its budget of shared memory, without spills. No GPU.

The compiler is that of the GPU image: what is in use there is what is judged here.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vase_kernels import scoring
from vase_kernels.attention import lse_kernel, weights_kernel
from vase_kernels.copy_rows import BLOCK_WORDS, copy_kernel
from vase_kernels.evict import BLOCK_PAIRS
from vase_kernels.overwrite import move_kernel, plan_kernel
from vase_kernels.pool import ELEMENTS
from vase_kernels.query_ring import MOST_ELEMENTS, store_kernel
from vase_kernels.requests import MAX_PROJECTION, OF_THE_BATCH
from vase_kernels.scores_attnv import draw_kernel
from vase_kernels.scores_dkv import dkv_kernel
from vase_kernels.scores_rkv import mix_kernel, similarity_kernel
from vase_kernels.scores_rows import norms_kernel, ranges_kernel
from vase_kernels.scores_simple import simple_kernel
from vase_kernels.scores_snapkv import snapkv_kernel
from vase_kernels.select import select_kernel

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MAX_SHARED = 100 * 1024

POINTERS = {
    "order": "*i32",
    "edges": "*i64",
    "faults": "*i32",
    "holes": "*i64",
    "sources": "*i32",
    "num_holes": "*i32",
    "round_sums": "*i64",
    "weights": "*fp32",
    "lse": "*fp32",
    "requests": "*i64",
    "req_to_token": "*i32",
    "store": "*i32",
    "k_pointers": "*i64",
    "v_pointers": "*i64",
    "source": "*i64",
    "target": "*i64",
}
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
#: Every dtype at the usual head_dim, the others where registers and shared memory are scarcest.
CASES = [(dtype, 128) for dtype in DTYPES] + [
    ("bf16", 64),
    ("bf16", 96),
    ("bf16", 256),
    ("e4m3", 256),
    ("fp32", 256),
]


def compiled(
    kernel: Any,
    queries: str = "*bf16",
    options: Any = None,
    pointers: Mapping[str, str] = POINTERS,
    **constants: Any,
) -> Any:
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers or name in ("queries", "ring"):
            signature[name] = pointers.get(name, queries)
            divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=TARGET, options=options)


def check(binary: Any, tmp_path: Path, max_stack: int = 0) -> None:
    """max_stack: bytes of registers that may lie in memory."""
    assert binary.metadata.shared < MAX_SHARED
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    numbers = {name: int(x) for name, x in re.findall(r"(REG|LOCAL|STACK):(\d+)", usage)}
    assert 0 < numbers["REG"] <= 255
    assert numbers["LOCAL"] == 0 and numbers["STACK"] <= max_stack, usage


def rows(dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    return {
        "ELEMENT": ELEMENTS[dtype],
        "HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def attention(
    kernel: Any, blocks: scoring.AttentionBlocks, dtype: torch.dtype, head_dim: int
) -> Any:
    queries = query_dtype(dtype)
    return compiled(
        kernel,
        f"*{ELEMENTS[queries]}",
        {"num_stages": blocks.stages, "num_warps": blocks.warps},
        **rows(dtype, head_dim),
        GROUP=5,
        BLOCK_Q=blocks.queries,
        BLOCK=blocks.columns,
        DOT=scoring.dot_operand(scoring.common_dtype(dtype, queries)),
    )


def dkv(dtype: torch.dtype, head_dim: int, fixed: bool) -> dict[str, Any]:
    part = scoring.part_dtype(dtype)
    return rows(dtype, head_dim) | {
        "BLOCK_J": MAX_PROJECTION,
        "PART": ELEMENTS[part],
        "DOT": scoring.dot_operand(part),
        "FIXED": fixed,
        "BLOCK": scoring.projection_block(head_dim, part).columns,
    }


KERNELS = (
    lse_kernel,
    weights_kernel,
    ranges_kernel,
    norms_kernel,
    similarity_kernel,
    mix_kernel,
    dkv_kernel,
    draw_kernel,
    snapkv_kernel,
    simple_kernel,
    select_kernel,
    plan_kernel,
    move_kernel,
    copy_kernel,
)
COLUMNS = {"HEADS": 8, "BLOCK": scoring.BLOCK_COLUMNS}


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_kernels_that_read_rows(name, head_dim, tmp_path):
    dtype = DTYPES[name]
    # The exceptions: three TF32 products of 256 columns hold more than the registers.
    widest = (dtype.itemsize, head_dim) == (4, 256)
    common = scoring.common_dtype(dtype, query_dtype(dtype))
    blocks = scoring.attention_blocks(head_dim, common)
    for kernel, of_kernel in zip((lse_kernel, weights_kernel), blocks, strict=True):
        binary = attention(kernel, of_kernel, dtype, head_dim)
        check(binary, tmp_path, max_stack=1024 if widest else 0)
        assert "wgmma" in binary.asm["ptx"] or dtype.itemsize == 4, "no Hopper tensor cores"
        # The conversion that keeps infinities and NaN; Triton's own to bfloat16 does not.
        assert "cvt.rn.f16x2.e5m2x2" in binary.asm["ptx"] or name != "e5m2"
    one_number = rows(dtype, head_dim) | {"BLOCK": scoring.BLOCK_ROWS}
    for keys in (True, False):
        check(compiled(ranges_kernel, **one_number, KEYS=keys), tmp_path)
    check(compiled(norms_kernel, **one_number), tmp_path)
    one_number["BLOCK"] = scoring.similarity_block(head_dim)
    check(compiled(similarity_kernel, **one_number), tmp_path)
    warps = scoring.projection_block(head_dim, scoring.part_dtype(dtype)).warps
    for fixed in {name == "bf16", False}:  # it changes one scalar
        binary = compiled(
            dkv_kernel,
            options={"num_warps": warps, "num_stages": 2},
            **dkv(dtype, head_dim, fixed),
        )
        check(binary, tmp_path, max_stack=3072 if widest else 0)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("bits", [tl.uint8, tl.int16, tl.int32], ids=str)
def test_moves(bits, head_dim, tmp_path):
    shape = rows(torch.bfloat16, head_dim) | {"ELEMENT": bits, "BLOCK": BLOCK_PAIRS}
    binary = compiled(move_kernel, **shape)
    check(binary, tmp_path)
    # Rows behind integer addresses are read in wide words all the same.
    assert re.search(r"ld\.global\S*\.v[24]\.b32", binary.asm["ptx"])


@pytest.mark.parametrize("words", [12, 96, 512, 1024, 4096, 5120])
def test_copies(words, tmp_path):
    block = min(BLOCK_WORDS, triton.next_power_of_2(words))
    binary = compiled(copy_kernel, WORDS=words, BLOCK=block)
    check(binary, tmp_path)
    for width in ("ld", "st"):  # only of tiny rows are words fewer than threads
        assert re.search(rf"{width}\.global\S*\.v4\.b32", binary.asm["ptx"]) or words < 512


@pytest.mark.parametrize("size", [64, 576, 1024, 5120])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_stores_of_queries(dtype, size, tmp_path):
    """Captured in every decode graph, so if it did not compile no request would run."""
    block = min(MOST_ELEMENTS, triton.next_power_of_2(size))
    pointers = {"rows": "*i64", "positions": "*i64", "ring_rows": "*i32"}
    binary = compiled(
        store_kernel, f"*{dtype}", pointers=pointers, WINDOW=128, SIZE=size, BLOCK=block
    )
    check(binary, tmp_path)
    assert re.search(r"st\.global\S*\.v4\.b32", binary.asm["ptx"]) or size == 64


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (select_kernel, {"VICTIMS": True}),
        (select_kernel, {"VICTIMS": False}),
        (plan_kernel, {}),
        (draw_kernel, {}),
        (snapkv_kernel, {}),
        (mix_kernel, {}),
        (simple_kernel, {"RANDOM": True}),
        (simple_kernel, {"RANDOM": False}),
    ],
)
def test_kernels_that_read_columns(kernel, constants, tmp_path):
    # One register, outside of every loop.
    one = 8 if kernel is select_kernel else 0
    check(compiled(kernel, **COLUMNS, **constants), tmp_path, max_stack=one)


def test_the_compiler_is_that_of_the_gpu_image():
    pins = (Path(__file__).parents[2] / "k8s/images/constraints-gpu.txt").read_text().split()
    assert f"triton=={triton.__version__}" in pins


def test_no_kernel_is_compiled_anew_for_the_shape_of_a_batch():
    """So the instructions of a request's round do not depend on its neighbours."""
    seen = set()
    for kernel in KERNELS:
        for parameter in kernel.params:
            if parameter.name in OF_THE_BATCH:
                assert parameter.do_not_specialize, f"{kernel.__name__}: {parameter.name}"
                seen.add(parameter.name)
    assert seen == set(OF_THE_BATCH)
