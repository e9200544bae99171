from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.path.codecs import BLOCK, LEVELS, decode_int8, encode_int8, equal_bits
from disback_plugin.weights.tensors import PIECE, pieces

LENGTHS = st.sampled_from([0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])


def pair(length, dtype, seed, size=1e-3):
    """A tensor and its predecessor."""
    stream = torch.Generator().manual_seed(seed)
    before = torch.randn(length, generator=stream)
    return (before + size * torch.randn(length, generator=stream)).to(dtype), before.to(dtype)


def encode(value, previous):
    parts = encode_int8(value, previous) if len(value) else {"q": value.to(torch.int8), "scale": value.bfloat16()}
    assert parts["q"].dtype == torch.int8
    assert parts["q"].shape == value.shape
    assert parts["scale"].dtype == torch.bfloat16
    assert parts["scale"].shape == (-(-len(value) // BLOCK),)
    return parts


def decode(parts, previous):
    out = torch.empty_like(previous)
    for start, stop in pieces(len(previous)):
        decode_int8(**parts, previous=previous[start:stop], start=start, out=out[start:stop])
    return out


@given(length=LENGTHS, seed=st.integers(0, 2**31), scale=st.floats(1e-12, 1e12))
def test_int8_stays_within_half_a_step_of_the_largest_difference(length, seed, scale):
    value, previous = pair(length, torch.float32, seed)
    value, previous = value * scale, previous * scale
    error = (decode(encode(value, previous), previous).double() - value.double()).abs()
    for start in range(0, length, BLOCK):
        block = slice(start, start + BLOCK)
        largest = (value[block].double() - previous[block].double()).abs().max()
        # Half a step, the rounding of the scale to 8 bits, and that of the sum in float32.
        allowed = largest * (0.5 / LEVELS + 2**-8) + 2 * value[block].abs().max() * 2**-23
        assert (error[block] <= allowed).all()


@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 10))
def test_a_decoded_value_does_not_depend_on_how_the_machine_adds(seed, exponent):
    """A fused multiply-add rounds once, a product and a sum twice: they agree because the product is exact."""
    value, previous = pair(4 * BLOCK, torch.float32, seed, size=2.0**exponent)
    parts = encode(value, previous)
    product = parts["q"].double() * parts["scale"].double().repeat_interleave(BLOCK)
    assert torch.equal(product.float().double(), product)
    assert torch.equal(decode(parts, previous), previous + product.float())


def test_decoding_in_place_and_into_new_memory_give_the_same():
    value, previous = pair(3 * BLOCK + 5, torch.float32, 0)
    parts = encode(value, previous)
    before = previous.clone()
    apart = decode(parts, previous)
    assert torch.equal(previous, before), "decoding wrote into the predecessor"
    decode_int8(**parts, previous=previous, start=0, out=previous)
    assert torch.equal(previous, apart)


def test_pieces_are_decoded_independently():
    value, previous = pair(2 * PIECE + 77, torch.float32, 0)
    parts = encode(value, previous)
    whole, last = decode(parts, previous), torch.empty(77)
    decode_int8(**parts, previous=previous[2 * PIECE :], start=2 * PIECE, out=last)
    assert torch.equal(last, whole[2 * PIECE :])
    assert (whole - value).abs().max() <= 1e-3


def test_half_precision_is_decoded_in_float32_and_cast_once():
    value, previous = pair(BLOCK, torch.bfloat16, 3, size=0.5)
    parts = encode(value, previous)
    exact = torch.empty(BLOCK)
    decode_int8(**parts, previous=previous.float(), start=0, out=exact)
    assert torch.equal(decode(parts, previous), exact.bfloat16())


def test_int8_takes_a_quarter_of_float32():
    value, previous = pair(1 << 16, torch.float32, 0)
    assert 4 * len(value) / sum(part.nbytes for part in encode(value, previous).values()) >= 3.9


def test_equality_is_that_of_bits():
    nan = torch.tensor([torch.nan, 1.0])
    assert equal_bits(nan, nan.clone())
    assert not equal_bits(torch.zeros(3), -torch.zeros(3))
