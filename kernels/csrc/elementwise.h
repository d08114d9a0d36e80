// One row of what stands between a layer's products, in float32 and rounded once.
#pragma once
#include <cmath>

#include "common.h"

namespace shoal {

// x / rms(x) * weight. With a residual, that becomes residual + x first, and is what is normalised.
template <class T>
void norm_row(T* out, const T* x, float* residual, const float* weight, long dim, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < dim; i += 16) {
        __m512 value = load(x + i);
        if (residual) {
            value = _mm512_add_ps(value, load(residual + i));
            store(residual + i, value);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / dim + eps));
    for (long i = 0; i < dim; i += 16) {
        const __m512 value = residual ? load(residual + i) : load(x + i);
        store(out + i, _mm512_mul_ps(_mm512_mul_ps(value, scale), load(weight + i)));
    }
}

// Rotates pairs (i, i + half) of one head.
template <class T>
void rotate(T* x, const float* cos, const float* sin, long half) {
    for (long i = 0; i < half; i += 16) {
        const __m512 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
        store(x + half + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
    }
}

// silu(gate) * up of 16 numbers.
template <class T>
void gate_16(T* out, const T* gate, const T* up) {
    const __m512 g = load(gate);
    const __m512 grown = exp2(_mm512_mul_ps(g, _mm512_set1_ps(-1.44269504088896341f)));
    const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(grown, _mm512_set1_ps(1)));
    store(out, _mm512_mul_ps(silu, load(up)));
}

}  // namespace shoal
