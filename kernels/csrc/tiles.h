// The product of one tile, over a format that says how its integers and scales are laid out.
#pragma once
#include <algorithm>
#include <cstring>

#include "product.h"

namespace shoal {

constexpr int kRows = 8;  // of x at once: 16 sums in registers

#define SHOAL_INLINE __attribute__((always_inline))

// Fetches what lies a few groups further on: the processor's own guesses end at each page.
template <int kBytes, int kGroups = 4>
inline void fetch_ahead(const uint8_t* from) {
    for (int at = 0; at < kBytes; at += 64) _mm_prefetch((const char*)from + kGroups * kBytes + at, _MM_HINT_T0);
}

// Adds two columns' products to the sums of R rows.
template <int R>
SHOAL_INLINE inline void add(__m512 (&sums)[R][kTile], __m512bh first, __m512bh second, const bf16* x, long stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        int32_t columns;
        std::memcpy(&columns, x + r * stride, sizeof columns);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(columns);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, both);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], second, both);
    }
}

// Which rows of a panel are rows of W: those past its last are padding.
inline __mmask16 stored(const Weight& weight, long tile, int panel) {
    const long left = weight.outputs - (tile * kTile + panel) * kPanel;
    return left >= kPanel ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
}

// R rows of y. For further rows of x the weights are unpacked anew: they come out of the first-level cache then, and
// reading them unpacked from the second one would cost more.
template <class Format, int R>
void product(const Weight& weight, long tile, const Rows& rows) {
    const long groups = weight.groups(), steps = weight.group / Format::kColumns, row_steps = weight.inputs / kStep;
    __m512 totals[R][kTile];
    for (auto& row : totals) row[0] = row[1] = _mm512_setzero_ps();
    const bf16* x = rows.x;
    for (long group = 0; group < groups; group++) {
        const uint8_t* data = Format::at(weight, tile, group);
        __m512 sums[R][kTile];
        for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
        for (long step = 0; step < steps; step++, x += Format::kColumns)
            Format::each_pair(data, step, [&](int pair, __m512bh first, __m512bh second) SHOAL_INLINE {
                add<R>(sums, first, second, x + 2 * pair, rows.stride);
            });
        Format::join(totals, sums, data, rows.sums + group * steps, steps, row_steps);
    }
    for (int panel = 0; panel < kTile; panel++) {
        const __mmask16 mask = stored(weight, tile, panel);
        for (int r = 0; r < R; r++) {
            const __m256i y = (__m256i)_mm512_cvtneps_pbh(totals[r][panel]);
            _mm256_mask_storeu_epi16(rows.y + r * rows.y_stride + panel * kPanel, mask, y);
        }
    }
}

template <class Format>
void multiply_tile(const Weight& weight, long tile, const Rows& rows) {
    using Product = void (*)(const Weight&, long, const Rows&);
    constexpr Product kProducts[kRows] = {product<Format, 1>, product<Format, 2>, product<Format, 3>, product<Format, 4>,
                                          product<Format, 5>, product<Format, 6>, product<Format, 7>, product<Format, 8>};
    for (long row = 0; row < rows.count; row += kRows) {
        const float* sums = rows.sums ? rows.sums + row * weight.inputs / kStep : nullptr;
        const Rows part{rows.x + row * rows.stride, kRows, rows.stride, sums, rows.y + row * rows.y_stride, rows.y_stride};
        kProducts[std::min<long>(rows.count - row, kRows) - 1](weight, tile, part);
    }
}

}  // namespace shoal
