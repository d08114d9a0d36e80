"""Codes become numbers, in registers.

Codes are exact in 16 bits, so the tensor cores multiply the very codes, and scales touch only sums. A code becomes a
number when its bits go into the mantissa of a constant which is then subtracted (Kim et al., "Who Says Elephants Can't
Run", arXiv:2211.10017); e4m3's go into the fields of the wider float.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

import triton
import triton.language as tl


@triton.constexpr_function
def _field_asm(shift: int) -> str:
    move = f"shr.b32 moved, $1, {shift};" if shift >= 0 else f"shl.b32 moved, $1, {-shift};"
    return f"{{ .reg .b32 moved; {move} lop3.b32 $0, moved, $2, $3, 0xEA; }}"  # 0xEA: moved & $2 | $3


@triton.jit
def _field(words, SHIFT: tl.constexpr, MASK: tl.constexpr, more, INTERPRETED: tl.constexpr):
    """`(words >> SHIFT) & MASK | more` of int16 words. No bit that MASK keeps crosses a word's end.

    Left to the compiler, each word is taken out of its register; here two are done at once.
    """
    if INTERPRETED:
        moved = words >> SHIFT if SHIFT >= 0 else words << -SHIFT
        bits = (moved & MASK | more).to(tl.int16)
    else:
        mask = tl.cast(MASK, tl.int16)
        more = tl.cast(more, tl.int16)
        bits = tl.inline_asm_elementwise(
            _field_asm(SHIFT), "=r,r,r,r", [words, mask, more], dtype=tl.int16, is_pure=True, pack=2
        )
    return bits


@triton.jit
def computed(numbers, INTERPRETED: tl.constexpr):
    """The interpreter computes wrongly with bfloat16."""
    return numbers.to(tl.float32) if INTERPRETED else numbers


@triton.jit
def _read(bits, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """int16 bits as numbers of `dtype`, or of one that the interpreter computes with; its cast loses subnormal ones."""
    if INTERPRETED and dtype == tl.bfloat16:
        numbers = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        numbers = computed(bits.to(dtype, bitcast=True), INTERPRETED)
    return numbers


@triton.jit
def half_of(bits):
    """float16 in the lower half of int32, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_of(scales_N, ENCODING: tl.constexpr):
    """float32 [N]."""
    return half_of(scales_N >> 16) if ENCODING == "int4" else scales_N


@triton.jit
def numbers_of(
    words_NK, scales_N, place: tl.constexpr, ENCODING: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The codes at one place of the words as numbers of `dtype`, 4-bit ones less their zero points.

    Dense words are such numbers. ZEROS: none are taken off; "whole" ones, and the result is exact; or "any".
    """
    UNIT: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400  # 128 or 1024: the mantissa counts ones
    if ENCODING == "dense":
        numbers_NK = words_NK
    elif ENCODING == "int4":
        numbers_NK = _read(_field(words_NK, 4 * place, 15, UNIT, INTERPRETED), dtype, INTERPRETED)
        zero_N = tl.zeros_like(scales_N).to(tl.float32) if ZEROS == "none" else half_of(scales_N)
        excess_N = zero_N + (128.0 if dtype == tl.bfloat16 else 1024.0)
        near_N = excess_N.to(dtype)
        numbers_NK -= computed(near_N, INTERPRETED)[:, None]
        if ZEROS == "any":
            numbers_NK -= computed((excess_N - near_N.to(tl.float32)).to(dtype), INTERPRETED)[:, None]
    elif ENCODING == "int8":  # the lower bits, less the sign, which counts 128
        lower_NK = _read(_field(words_NK, 8 * place, 0x7F, UNIT, INTERPRETED), dtype, INTERPRETED)
        numbers_NK = lower_NK - _read(_field(words_NK, 8 * place, 0x80, UNIT, INTERPRETED), dtype, INTERPRETED)
    else:  # as the exponent's lowest bits e4m3's make the number too small by a power of two, and subnormal ones too
        UP: tl.constexpr = 4 if dtype == tl.bfloat16 else 7
        sign_NK = _field(words_NK, 8 * place - 8, -0x8000, 0, INTERPRETED)
        small_NK = _read(_field(words_NK, 8 * place - UP, 0x7F << UP, sign_NK, INTERPRETED), dtype, INTERPRETED)
        numbers_NK = small_NK * (2.0**120 if dtype == tl.bfloat16 else 2.0**8)
    return numbers_NK.to(dtype)
