// 8-bit weights, w = scale * q + minimum with float32 numbers for each group of a row's columns, or for all of them. Many
// have no minima: then they take no room.
//
// A tile is 2 panels of 16 rows of W, its groups lie one after the other: 2 x 16 scales, as many minima, then 64 bytes for
// each two columns, 32 a panel: byte 2 j + b is row j's, of column 2 p + b. Groups are whole runs of `kColumns` columns.
//
// Logits lie near each other and far from zero, so a head's product is float32 throughout, and weights are scaled first:
// exactly, where the scale was a float16. A lane adds up every other column of its row.
#include "tiles.h"

namespace shoal {
namespace {

constexpr int kScaleBytes = kTileRows * sizeof(float), kPairBytes = 2 * kTileRows;

// 16 integers in float32: of 8 rows, two columns each.
inline __m512 numbers(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

template <int kRun, bool kMinima>
struct Q8 {
    static constexpr int kColumns = kRun;  // that are unpacked together
    static constexpr int kHeadBytes = (kMinima ? 2 : 1) * kScaleBytes, kRunBytes = kColumns / 2 * kPairBytes;

    static const uint8_t* at(const Weight& weight, long tile, long group) {
        return weight.data + (tile * weight.groups() + group) * (kHeadBytes + weight.group * kTileRows);
    }
    static __m512bh operand(const uint8_t* from) { return _mm512_cvtne2ps_pbh(numbers(from + 16), numbers(from)); }

    template <class Take>
    SHOAL_INLINE static void each_pair(const uint8_t* group, long step, const Take& take) {
        const uint8_t* data = group + kHeadBytes + step * kRunBytes;
        fetch_ahead<kRunBytes>(data);
#pragma GCC unroll 4
        for (int pair = 0; pair < kColumns / 2; pair++, data += kPairBytes)
            take(pair, operand(data), operand(data + kPairBytes / 2));
    }

    template <int R>
    SHOAL_INLINE static void join(__m512 (&totals)[R][kTile], const __m512 (&sums)[R][kTile], const uint8_t* group,
                                  const float* x_sums, long steps, long row_steps) {
        float x_sum[R] = {};
        if constexpr (kMinima)
            for (int r = 0; r < R; r++)
                for (long step = 0; step < steps; step++) x_sum[r] += x_sums[r * row_steps + step];
#pragma GCC unroll 2
        for (int panel = 0; panel < kTile; panel++) {
            const __m512 scale = load((const float*)group + panel * kPanel);
            const __m512 minimum = kMinima ? load((const float*)(group + kScaleBytes) + panel * kPanel) : scale;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                totals[r][panel] = _mm512_fmadd_ps(scale, sums[r][panel], totals[r][panel]);
                if constexpr (kMinima)
                    totals[r][panel] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x_sum[r]), totals[r][panel]);
            }
        }
    }
};

constexpr int kQuarters = 4;    // vectors that two columns of a tile fill: 8 rows each
constexpr int kLogitRows = 4;   // of x at once: 16 sums in registers

// A group's scales as its numbers need them, twice each.
inline void spread_scales(const uint8_t* group, __m512 (&scales)[kQuarters]) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (int q = 0; q < kQuarters; q++) {
        const __m512 eight = _mm512_castps256_ps512(_mm256_loadu_ps((const float*)group + 8 * q));
        scales[q] = _mm512_permutexvar_ps(twice, eight);
    }
}

// take(columns, the four vectors of weights) for each two columns of a tile.
template <class Take>
SHOAL_INLINE inline void each_weights(const Weight& weight, long tile, const Take& take) {
    for (long group = 0; group < weight.groups(); group++) {
        const uint8_t* data = Q8<kStep, false>::at(weight, tile, group);
        __m512 scales[kQuarters], weights[kQuarters];
        spread_scales(data, scales);
        data += kScaleBytes;
        for (long column = 0; column < weight.group; column += 2, data += kPairBytes) {
            _mm_prefetch((const char*)data + 4 * Q8<kStep, false>::kRunBytes, _MM_HINT_T0);
            for (int q = 0; q < kQuarters; q++) weights[q] = _mm512_mul_ps(numbers(data + 16 * q), scales[q]);
            take(group * weight.group + column, weights);
        }
    }
}

struct LogitRows {
    const float* x;
    long count, stride;
    float* y;
};

template <int R>
SHOAL_INLINE inline void add_columns(__m512 (&sums)[R][kQuarters], const __m512* weights, const float* x, long stride) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        int64_t columns;
        std::memcpy(&columns, x + r * stride, sizeof columns);
        const __m512 both = _mm512_castsi512_ps(_mm512_set1_epi64(columns));
        for (int q = 0; q < kQuarters; q++) sums[r][q] = _mm512_fmadd_ps(weights[q], both, sums[r][q]);
    }
}

// R rows by one tile.
template <int R>
void logits(const Weight& weight, long tile, const LogitRows& rows) {
    __m512 sums[R][kQuarters];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    each_weights(weight, tile, [&](long column, const __m512* weights) SHOAL_INLINE {
        add_columns<R>(sums, weights, rows.x + column, rows.stride);
    });
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int panel = 0; panel < kTile; panel++) {
        const __mmask16 mask = stored(weight, tile, panel);
        for (int r = 0; r < R; r++) {
            const __m512 low = sums[r][2 * panel], high = sums[r][2 * panel + 1];
            const __m512 y = _mm512_add_ps(_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high));
            _mm512_mask_storeu_ps(rows.y + r * weight.outputs + tile * kTileRows + panel * kPanel, mask, y);
        }
    }
}

void logits_tile(const Weight& weight, long tile, const LogitRows& rows) {
    using Logits = void (*)(const Weight&, long, const LogitRows&);
    constexpr Logits kLogits[kLogitRows] = {logits<1>, logits<2>, logits<3>, logits<4>};
    for (long row = 0; row < rows.count; row += kLogitRows) {
        const LogitRows part{rows.x + row * rows.stride, kLogitRows, rows.stride, rows.y + row * weight.outputs};
        kLogits[std::min<long>(rows.count - row, kLogitRows) - 1](weight, tile, part);
    }
}

}  // namespace

void multiply_q8(const Weight& weight, long tile, const Rows& rows) {
    if (weight.minima)
        multiply_tile<Q8<kStep, true>>(weight, tile, rows);
    else if (weight.group % kStep)
        multiply_tile<Q8<kStep / 2, false>>(weight, tile, rows);
    else
        multiply_tile<Q8<kStep, false>>(weight, tile, rows);
}

}  // namespace shoal

// y [rows, outputs] = x [rows, inputs] W^T, all float32; a row of x starts `stride` numbers after the one before.
extern "C" void shoal_q8_logits(float* y, const float* x, const shoal::Weight* weight, long count, long stride) {
    shoal::parallel_for(count ? weight->tiles() : 0,
                        [&](long tile) { shoal::logits_tile(*weight, tile, {x, count, stride, y}); });
}
