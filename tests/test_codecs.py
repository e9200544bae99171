from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import codecs
from disback_plugin.path.codecs import BLOCK, CODES, SMALLEST_FIRST, check_codec, code_for
from disback_plugin.weights.tensor_meta import PIECE, pieces

LOSSY = [name for name in SMALLEST_FIRST if name != "exact"]
LENGTHS = st.sampled_from([0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])


def walk(length, dtype, seed, size=1e-3):
    """A tensor and its predecessor."""
    stream = torch.Generator().manual_seed(seed)
    before = torch.randn(length, generator=stream)
    return (before + size * torch.randn(length, generator=stream)).to(dtype), before.to(dtype)


def decode(code, parts, previous):
    out = torch.empty_like(previous)
    for start, stop in pieces(len(previous)):
        code.decode(parts, previous[start:stop], start, out[start:stop])
    return out


def fits(code, parts, length, dtype):
    sizes = code.sizes(length, dtype)
    return parts.keys() == sizes.keys() and all(
        parts[name].dtype == kind and parts[name].ndim == 1 and size in (None, len(parts[name]))
        for name, (kind, size) in sizes.items()
    )


@given(
    length=LENGTHS,
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.int8]
    ),
)
def test_exact_is_exact_for_every_kind_of_number(length, seed, dtype):
    value, previous = walk(length, torch.float64, seed, size=1e30 if dtype is torch.float64 else 9.0)
    value, previous = value.to(dtype), previous.to(dtype)
    parts = CODES["exact"].encode(value, previous)
    assert fits(CODES["exact"], parts, length, dtype)
    assert torch.equal(decode(CODES["exact"], parts, previous), value)


def test_exact_keeps_infinities_nans_and_the_sign_of_zero():
    value = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 0.0, 1e-45])
    previous = torch.tensor([0.0, float("inf"), 1.0, 0.0, -0.0, -1e-45])
    found = decode(CODES["exact"], CODES["exact"].encode(value, previous), previous)
    assert torch.equal(found.view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("name", LOSSY)
@given(length=LENGTHS, seed=st.integers(0, 2**31), scale=st.floats(1e-12, 1e12))
def test_a_lossy_code_stays_within_half_a_step_of_the_largest_difference(name, length, seed, scale):
    value, previous = walk(length, torch.float32, seed)
    value, previous = value * scale, previous * scale
    code = CODES[name]
    parts = code.encode(value, previous)
    assert fits(code, parts, length, torch.float32)
    error = (decode(code, parts, previous).double() - value.double()).abs()
    levels = {"bf16": 255}.get(name) or code.levels
    for start in range(0, length, BLOCK):
        block = slice(start, start + BLOCK)
        largest = (value[block].double() - previous[block].double()).abs().max()
        # Half a step, the rounding of the scale to 8 bits, and that of the sum in float32.
        allowed = largest * (0.5 / levels + 2**-8) + 2 * value[block].abs().max() * 2**-23
        assert (error[block] <= allowed).all()


@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 10))
def test_a_decoded_value_does_not_depend_on_how_the_machine_adds(name, seed, exponent):
    """A fused multiply-add rounds once, a product and a sum twice: they agree because the product is exact."""
    value, previous = walk(4 * BLOCK, torch.float32, seed, size=2.0**exponent)
    code = CODES[name]
    parts = code.encode(value, previous)
    q = codecs.unpack(parts, 0, len(value), torch.int8) if code.packed else parts["q"]
    product = q.double() * parts["scale"].double().repeat_interleave(BLOCK)
    assert torch.equal(product.float().double(), product)
    assert torch.equal(decode(code, parts, previous), previous + product.float())


@pytest.mark.parametrize("name", LOSSY)
def test_in_place_and_into_new_memory_are_the_same(name):
    value, previous = walk(3 * BLOCK + 5, torch.float32, 0)
    parts = CODES[name].encode(value, previous)
    apart = decode(CODES[name], parts, previous)
    before = previous.clone()
    decode(CODES[name], parts, previous)
    assert torch.equal(previous, before), "decoding wrote into the predecessor"
    CODES[name].decode(parts, previous, 0, previous)
    assert torch.equal(previous, apart)


@pytest.mark.parametrize("name", SMALLEST_FIRST)
def test_pieces_are_decoded_on_their_own(name):
    value, previous = walk(2 * PIECE + 77, torch.float32, 0)
    parts = CODES[name].encode(value, previous)
    whole, last = decode(CODES[name], parts, previous), torch.empty(77)
    CODES[name].decode(parts, previous[2 * PIECE :], 2 * PIECE, last)
    assert torch.equal(last, whole[2 * PIECE :])
    assert (whole - value).abs().max() <= 1e-3


@pytest.mark.parametrize("name", LOSSY)
def test_half_precision_is_decoded_in_float32_and_cast_once(name):
    value, previous = walk(BLOCK, torch.bfloat16, 3, size=0.5)
    parts = CODES[name].encode(value, previous)
    exact = torch.empty(BLOCK)
    CODES[name].decode(parts, previous.float(), 0, exact)
    assert torch.equal(decode(CODES[name], parts, previous), exact.bfloat16())


def test_smaller_codecs_are_smaller():
    value, previous = walk(1 << 16, torch.float32, 0)
    sizes = [
        sum(p.numel() * p.element_size() for p in CODES[name].encode(value, previous).values())
        for name in SMALLEST_FIRST
    ]
    assert sizes == sorted(sizes)
    assert 4 * len(value) / sizes[SMALLEST_FIRST.index("int8")] >= 3.9


@pytest.mark.parametrize(
    ("value", "previous", "expected"),
    [
        (torch.zeros(3), torch.zeros(3), "same"),
        (torch.zeros(3), -torch.zeros(3), "int8"),  # another sign of zero is another value
        (torch.ones(3), torch.zeros(3), "int8"),
        (torch.ones(3).long(), torch.zeros(3).long(), "exact"),
        (torch.ones(3).double(), torch.zeros(3).double(), "exact"),
        (torch.tensor([float("-inf"), 1.0]), torch.tensor([float("-inf"), 2.0]), "exact"),
        (torch.tensor([True]), torch.tensor([False]), "exact"),
    ],
)
def test_what_a_codec_cannot_hold_is_stored_exactly(value, previous, expected):
    assert code_for("int8", value, previous) == expected


@pytest.mark.parametrize("codec", [*SMALLEST_FIRST, "auto", "auto:0.5"])
def test_every_codec_has_a_name(codec):
    check_codec(codec)


@pytest.mark.parametrize("codec", ["int7", "same", "auto:", "auto:0", "auto:x", "auto:2", "int8:3", "", "AUTO"])
def test_another_name_is_refused(codec):
    with pytest.raises(OptionError, match=r"found codec=.*expected 'auto'.*to mend it"):
        check_codec(codec)


@settings(max_examples=30)
@given(where=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_frame_never_decodes_to_another_size(where, bit):
    value, previous = walk(500, torch.float32, 0)
    parts = CODES["int6"].encode(value, previous)
    parts["bytes"][where % len(parts["bytes"])] ^= 1 << bit
    try:
        assert len(decode(CODES["int6"], parts, previous)) == 500
    except PathError as error:
        assert "compressed piece" in str(error)  # noqa: PT017


def test_a_frame_that_declares_a_huge_size_is_not_believed():
    value, previous = walk(500, torch.float32, 0)
    parts = CODES["int6"].encode(value, previous)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    parts |= {"bytes": torch.frombuffer(bytearray(bomb), dtype=torch.uint8), "frames": torch.tensor([len(bomb)])}
    with pytest.raises(PathError, match=r"compressed piece of 67108864 bytes; expected 500 bytes"):
        decode(CODES["int6"], parts, previous)
