"""Where the rows of a KV pool lie."""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

#: Triton's names of the element types a pool may have.
ELEMENTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PoolView:
    """Where the rows of a KV pool lie. Build it once with `PoolView.of`.

    k_pointers, v_pointers : int64 Tensor [layers]
        Addresses of the K and V buffers.
    token_positions : int32 Tensor [layers, num_slots, kv_heads]
    req_to_token : int32 Tensor [rows, context]
        Slot of each column of each request.
    attention_scale : what the model multiplies q.k by
    buffers : the tensors behind the addresses, kept alive
    """

    k_pointers: Tensor
    v_pointers: Tensor
    token_positions: Tensor
    req_to_token: Tensor
    dtype: torch.dtype
    head_dim: int
    first_head: int
    attention_scale: float
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        k_buffers: Sequence[Tensor],
        v_buffers: Sequence[Tensor],
        token_positions: Tensor,
        req_to_token: Tensor,
        *,
        first_head: int = 0,
        attention_scale: float | None = None,
    ) -> PoolView:
        """View of a pool; `ValueError` names what the kernels cannot address.

        Parameters
        ----------
        k_buffers, v_buffers : sequence of Tensor [num_slots, kv_heads, head_dim]
            One K and one V tensor a layer: contiguous, starting on 16 bytes, rows a multiple of
            16 bytes; float32, float16, bfloat16, float8_e4m3fn or float8_e5m2.
        first_head : int
            Global index of this rank's first KV head.
        attention_scale : float or None
            What the model multiplies q.k by, positive; None for 1/sqrt(head_dim).
        """
        layers, (num_slots, kv_heads, head_dim) = len(k_buffers), k_buffers[0].shape
        dtype = k_buffers[0].dtype
        if dtype not in ELEMENTS:
            raise ValueError(f"KV dtype {dtype} is none of {', '.join(map(str, ELEMENTS))}")
        for name, buffers in (("K", k_buffers), ("V", v_buffers)):
            if len(buffers) != layers:
                raise ValueError(f"{layers} K buffers, {len(buffers)} {name} buffers")
            for layer, x in enumerate(buffers):
                if x.shape != k_buffers[0].shape or x.dtype != dtype:
                    raise ValueError(f"{name} of layer {layer}: {x.dtype} {tuple(x.shape)}")
                if not x.is_contiguous() or x.data_ptr() % 16 or head_dim * x.itemsize % 16:
                    raise ValueError(f"{name} of layer {layer}: rows are not aligned to 16 bytes")
        if token_positions.shape != (layers, num_slots, kv_heads):
            raise ValueError(f"token_positions {tuple(token_positions.shape)}, want that of K")
        for name, x in (("token_positions", token_positions), ("req_to_token", req_to_token)):
            if x.dtype != torch.int32 or not x.is_contiguous():
                raise ValueError(f"{name}: want contiguous int32, got {x.dtype}")
        device = token_positions.device
        return cls(
            k_pointers=torch.tensor([x.data_ptr() for x in k_buffers], device=device),
            v_pointers=torch.tensor([x.data_ptr() for x in v_buffers], device=device),
            token_positions=token_positions,
            req_to_token=req_to_token,
            dtype=dtype,
            head_dim=head_dim,
            first_head=first_head,
            attention_scale=head_dim**-0.5 if attention_scale is None else attention_scale,
            buffers=(*k_buffers, *v_buffers),
        )
