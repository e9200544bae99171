from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.weights.tensors import Checksum, checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]


@st.composite
def tensors(draw):
    seed, length, dtype = draw(st.integers(0, 2**31)), draw(st.integers(0, 2000)), draw(st.sampled_from(DTYPES))
    return (9 * torch.randn(length, generator=torch.Generator().manual_seed(seed))).to(dtype)


@given(tensor=tensors(), cut=st.integers(0, 2))
def test_the_size_of_the_pieces_does_not_matter(tensor, cut):
    total = Checksum()
    for start in range(0, max(len(tensor), 1), 512 * (cut + 1)):
        total.add("w", tensor[start : start + 512 * (cut + 1)])
    assert total.digest() == checksum({"w": tensor})


@given(tensor=tensors(), where=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_changes_it(tensor, where, bit):
    other = tensor.clone()
    raw = other.view(torch.uint8)
    if len(raw):
        raw[where % len(raw)] ^= 1 << bit
        assert checksum({"w": other}) != checksum({"w": tensor})


@given(tensor=tensors(), offset=st.integers(0, 9))
def test_neither_alignment_nor_layout_matters(tensor, offset):
    padded = torch.cat([torch.zeros(offset, dtype=tensor.dtype), tensor])
    assert checksum({"w": padded[offset:]}) == checksum({"w": tensor})
    square = tensor[: len(tensor) // 4 * 4].view(-1, 4)
    assert checksum({"w": square.T.contiguous().T}) == checksum({"w": square})


def test_tensors_in_each_others_place_are_noticed():
    a, b = torch.randn(4), torch.randn(4)
    assert checksum({"a": a, "b": b}) != checksum({"a": b, "b": a})
    assert checksum({"a": a}) != checksum({"b": a})
    assert checksum({"a": a, "b": b}) == checksum({"b": b, "a": a})


def test_rows_in_another_order_and_another_dtype_are_noticed():
    w = torch.randn(8, 10)
    assert checksum({"w": w.flip(0)}) != checksum({"w": w})
    assert checksum({"w": w.view(torch.int32)}) != checksum({"w": w})
