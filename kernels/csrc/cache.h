// Where keys and values lie, and what is stored of them: numbers, or codes of 8 bits with a scale for each token and head.
// What a code means: kernels/kv_codes.py.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common.h"

namespace shoal {

struct int8 { int8_t code; };
struct fp8 { uint8_t bits; };  // e4m3, no infinities

enum Code : long { kNumbers, kInt8, kFp8 };

struct KvLayer {  // mirrored in kernels/native.py
    void *k, *v;                 // [pages, kv heads, page size, dim]
    float *k_scales, *v_scales;  // without dim; null: numbers are stored as they are
    long code;
};

template <class Stored>
constexpr bool kCoded = std::is_same_v<Stored, int8> || std::is_same_v<Stored, fp8>;

// body(S{}) with the type of what is stored, beside activations in bfloat16.
template <class Body>
void with_stored(const KvLayer& kv, const Body& body) {
    switch (kv.code) {
        case kInt8: return body(int8{});
        case kFp8: return body(fp8{});
        default: return body(bf16{});
    }
}

inline __m512 load(const int8* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))); }

// In float32's fields e4m3's exponent is too small by 120, and so is that of its subnormal numbers.
inline __m512 load(const fp8* from) {
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x80)), 24);
    const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7f)), 20);
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), _mm512_set1_ps(0x1p120f));
}

inline void store_codes(int8* to, __m512 x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))); }

// Rounded to three bits of mantissa, ties to even: a number that is added and taken away drives out what is beyond them.
inline void store_codes(fp8* to, __m512 x) {
    const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000));
    const __m512i first = _mm512_max_epi32(exponent, _mm512_set1_epi32((127 - 6) << 23));  // subnormal below 2^-6
    const __m512 driver = _mm512_mul_ps(_mm512_set1_ps(1.5f),
                                        _mm512_castsi512_ps(_mm512_add_epi32(first, _mm512_set1_epi32((23 - 3) << 23))));
    const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(x, driver), driver);
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(rounded));
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32((127 - 7) << 3));
    const __m512i small = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_abs_ps(rounded), _mm512_set1_ps(512)));
    const __mmask16 is_small = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32((127 - 6) << 23));
    const __m512i sign = _mm512_srli_epi32(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(1u << 31)), 24);
    const __m512i code = _mm512_or_si512(_mm512_mask_mov_epi32(normal, is_small, small), sign);
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(code));
}

// One token's head as codes; its scale. What is not finite becomes code 0, and its head's scale is not finite.
template <class Stored>
float encode(Stored* codes, const bf16* x, long dim) {
    constexpr float kLargest = std::is_same_v<Stored, int8> ? 127 : 448, kSmallest = 1e-30f;
    __m512 most = _mm512_setzero_ps();
    __mmask16 is_nan = 0;
    for (long e = 0; e < dim; e += 16) {
        const __m512 number = load(x + e);
        most = _mm512_max_ps(most, _mm512_abs_ps(number));
        is_nan |= _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q);
    }
    float highest = std::max(_mm512_reduce_max_ps(most), kSmallest);
    if (is_nan) highest = NAN;
    const __m512 factor = _mm512_set1_ps(kLargest / highest);
    for (long e = 0; e < dim; e += 16) {
        const __m512 number = _mm512_mul_ps(load(x + e), factor);
        store_codes(codes + e, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(number, number, _CMP_ORD_Q), number));
    }
    return highest / kLargest;
}

// A stored number or code as a bfloat16 number, exactly.
inline bf16 as_bf16(bf16 x) { return x; }
inline bf16 as_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {(uint16_t)(bits >> 16)};
}
inline bf16 as_bf16(int8 x) { return as_bf16((float)x.code); }
inline bf16 as_bf16(fp8 x) {
    const uint32_t bits = (uint32_t)(x.bits & 0x80) << 24 | (uint32_t)(x.bits & 0x7f) << 20;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return as_bf16(number * 0x1p120f);
}

// y[i] *= x[i]
inline void multiply_by(float* y, const float* x, long count) {
    for (long i = 0; i < count; i += 16) {
        const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
        const __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, y + i), _mm512_maskz_loadu_ps(mask, x + i));
        _mm512_mask_storeu_ps(y + i, mask, product);
    }
}

}  // namespace shoal
