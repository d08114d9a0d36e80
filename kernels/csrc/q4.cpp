// 4-bit weights, w = scale * q + minimum with two float16 numbers for each 32 of a row: GGUF's Q4_0 and Q4_1.
//
// They are packed for vdpbf16ps, which adds two products to each of 16 sums: a tile is 2 panels of 16 rows of W, its
// groups of 32 columns lie one after the other, in 320 bytes a panel: 16 scales, 16 minima, then 4 x 64 bytes of
// nibbles. The 16-bit lane 2 j + b of load c has 4 of them, of row j and of columns 8 c + 2 p + b for p = 0 to 3.
// Unpacking is then a shift and a look-up for 32 weights.
#include "tiles.h"

namespace shoal {
namespace {

struct Q4 {
    static constexpr int kColumns = kStep;  // that are unpacked together
    static constexpr int kMinimaAt = 32, kNibblesAt = 64, kBlockBytes = 320;

    static const uint8_t* at(const Weight& weight, long tile, long group) {
        return weight.data + (tile * weight.groups() + group) * kTile * kBlockBytes;
    }

    static __m512bh operand(__m512i nibbles, int p) {
        // 0 to 15 in bfloat16, twice: the look-up takes 5 bits of an index, of which the fifth is another nibble's.
        const __m256i values = _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110,
                                                 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170);
        return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * p), _mm512_broadcast_i64x4(values));
    }

    template <class Take>
    SHOAL_INLINE static void each_pair(const uint8_t* block, long, const Take& take) {
        fetch_ahead<kTile * kBlockBytes>(block);
        for (int c = 0; c < 4; c++) {
            const __m512i first = _mm512_loadu_si512(block + kNibblesAt + 64 * c);
            const __m512i second = _mm512_loadu_si512(block + kBlockBytes + kNibblesAt + 64 * c);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) take(4 * c + p, operand(first, p), operand(second, p));
        }
    }

    template <int R>
    SHOAL_INLINE static void join(__m512 (&totals)[R][kTile], const __m512 (&sums)[R][kTile], const uint8_t* block,
                                  const float* x_sums, long, long row_steps) {
#pragma GCC unroll 2
        for (int panel = 0; panel < kTile; panel++) {
            const __m512 scale = load((const fp16*)(block + panel * kBlockBytes));
            const __m512 minimum = load((const fp16*)(block + panel * kBlockBytes + kMinimaAt));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512 sum = _mm512_set1_ps(x_sums[r * row_steps]);
                totals[r][panel] = _mm512_fmadd_ps(scale, sums[r][panel], _mm512_fmadd_ps(minimum, sum, totals[r][panel]));
            }
        }
    }
};

}  // namespace

void multiply_q4(const Weight& weight, long tile, const Rows& rows) { multiply_tile<Q4>(weight, tile, rows); }

}  // namespace shoal
