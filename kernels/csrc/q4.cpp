// y = x W^T for x and y in bfloat16 and W in 4 bits, w = scale * q + minimum with two float16 numbers for each 32 of a row.
//
// Nothing but y is rounded: q (0 to 15) is exact in bfloat16, so vdpbf16ps sums q x over a group of 32 in float32, and
// scale and minimum join after it: y = sum over groups of scale * (sum of q x) + minimum * (sum of x). Unpacking is then a
// shift and a look-up for 32 weights, and each y is the same chain of sums whatever other rows x has.
//
// W is packed for that instruction, which adds two products to each of 16 sums: a tile is 2 panels of 16 rows of W, its
// groups of 32 columns lie one after the other, in 320 bytes a panel: 16 scales, 16 minima, then 4 x 64 bytes of
// nibbles. The 16-bit lane 2 j + b of load c has 4 of them, of row j and of columns 8 c + 2 p + b for p = 0 to 3.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"

namespace shoal {
namespace {

constexpr int kPanel = 16, kTile = 2, kGroup = 32, kPairs = kGroup / 2;
constexpr int kMinimaAt = 32, kNibblesAt = 64, kBlockBytes = 320;
constexpr int kRows = 8;  // of x at once: 16 sums in registers
constexpr int kAhead = 4 * kTile * kBlockBytes;
constexpr long kAlone = 1 << 14;  // numbers that one thread adds up sooner than it wakes the others

struct Weights {
    const uint8_t* data;
    long groups, outputs;
    const uint8_t* block(long tile, long group) const { return data + (tile * groups + group) * kTile * kBlockBytes; }
};

struct Rows {
    const bf16* x;
    long stride;
    const float* sums;  // [rows, groups] of x over a group's columns
    bf16* y;
};

// Fetches the block a few groups further on: the processor's own guesses end at each page.
inline void fetch_ahead(const uint8_t* block) {
    for (int at = 0; at < kTile * kBlockBytes; at += 64) _mm_prefetch((const char*)block + kAhead + at, _MM_HINT_T0);
}

// Load c of a panel's nibbles, and from it operand p: two columns of 16 rows in bfloat16.
inline __m512i nibbles(const uint8_t* block, int panel, int c) {
    return _mm512_loadu_si512(block + panel * kBlockBytes + kNibblesAt + 64 * c);
}
inline __m512bh operand(__m512i nibbles, int p) {
    // 0 to 15 in bfloat16, twice: the look-up takes 5 bits of an index, of which the fifth is another nibble's.
    const __m256i values = _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110,
                                             0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170);
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * p), _mm512_broadcast_i64x4(values));
}

// The nibbles of a tile as operands, [groups, pairs, panels]: worth it where more than one block of rows needs them.
const __m512bh* unpack(const Weights& weights, long tile) {
    struct Operand { __m512bh value; };
    static thread_local std::vector<Operand> scratch;  // stays in the core's second-level cache
    scratch.resize(weights.groups * kPairs * kTile);
    Operand* next = scratch.data();
    for (long group = 0; group < weights.groups; group++) {
        const uint8_t* block = weights.block(tile, group);
        fetch_ahead(block);
        for (int c = 0; c < 4; c++) {
            const __m512i first = nibbles(block, 0, c), second = nibbles(block, 1, c);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) *next++ = {operand(first, p)}, *next++ = {operand(second, p)};
        }
    }
    return &scratch[0].value;
}

// Adds two columns' products to the sums of R rows.
template <int R>
__attribute__((always_inline)) inline void add(__m512 (&sums)[R][kTile], __m512bh first, __m512bh second,
                                                const bf16* x, long stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        int32_t columns;
        std::memcpy(&columns, x + r * stride, sizeof columns);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(columns);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, both);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], second, both);
    }
}

// R rows' sums of q x over one group, from the nibbles or, where they are unpacked already, from operands.
template <int R>
__attribute__((always_inline)) inline void add_group(__m512 (&sums)[R][kTile], const uint8_t* block, const bf16* x,
                                                      long stride) {
    fetch_ahead(block);
    for (int c = 0; c < 4; c++) {
        const __m512i first = nibbles(block, 0, c), second = nibbles(block, 1, c);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) add<R>(sums, operand(first, p), operand(second, p), x + 8 * c + 2 * p, stride);
    }
}
template <int R>
__attribute__((always_inline)) inline void add_group(__m512 (&sums)[R][kTile], const __m512bh* operands, const bf16* x,
                                                      long stride) {
    for (int pair = 0; pair < kPairs; pair++, operands += kTile)
        add<R>(sums, operands[0], operands[1], x + 2 * pair, stride);
}

template <int R>
void product(const Weights& weights, long tile, const __m512bh* unpacked, const Rows& rows) {
    __m512 totals[R][kTile];
    for (auto& row : totals) row[0] = row[1] = _mm512_setzero_ps();
    for (long group = 0; group < weights.groups; group++) {
        const uint8_t* block = weights.block(tile, group);
        const bf16* x = rows.x + group * kGroup;
        __m512 sums[R][kTile];
        for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
        if (unpacked)
            add_group<R>(sums, unpacked + group * kPairs * kTile, x, rows.stride);
        else
            add_group<R>(sums, block, x, rows.stride);
#pragma GCC unroll 2
        for (int panel = 0; panel < kTile; panel++) {
            const __m512 scale = load((const fp16*)(block + panel * kBlockBytes));
            const __m512 minimum = load((const fp16*)(block + panel * kBlockBytes + kMinimaAt));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512 sum = _mm512_set1_ps(rows.sums[r * weights.groups + group]);
                totals[r][panel] = _mm512_fmadd_ps(scale, sums[r][panel], _mm512_fmadd_ps(minimum, sum, totals[r][panel]));
            }
        }
    }
    for (int panel = 0; panel < kTile; panel++) {
        const long column = (tile * kTile + panel) * kPanel, left = weights.outputs - column;
        const __mmask16 mask = left >= kPanel ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        for (int r = 0; r < R; r++) {
            const __m256i y = (__m256i)_mm512_cvtneps_pbh(totals[r][panel]);
            _mm256_mask_storeu_epi16(rows.y + r * weights.outputs + column, mask, y);
        }
    }
}

using Product = void (*)(const Weights&, long, const __m512bh*, const Rows&);
constexpr Product kProducts[kRows] = {product<1>, product<2>, product<3>, product<4>,
                                      product<5>, product<6>, product<7>, product<8>};

// Sums of one row of x over each group.
void sum_groups(const bf16* x, long groups, float* sums) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (long first = 0; first < groups; first += 4) {
        const long count = std::min(groups - first, 4L);
        __m512 lanes[4];
        for (long i = 0; i < 4; i++) {
            const __m512bh columns = (__m512bh)_mm512_loadu_si512(x + (first + std::min(i, count - 1)) * kGroup);
            lanes[i] = _mm512_dpbf16_ps(_mm512_setzero_ps(), columns, ones);
        }
        _mm_mask_storeu_ps(sums + first, (1u << count) - 1, sum_each(lanes));
    }
}

}  // namespace
}  // namespace shoal

// y [rows, outputs] = x [rows, inputs] W^T; shape: rows, numbers from one row of x to the next, inputs, outputs. W has
// ceil(outputs / 32) tiles; what their last rows hold is not stored.
extern "C" void shoal_q4_product(shoal::bf16* y, const shoal::bf16* x, const uint8_t* packed, const long* shape) {
    using namespace shoal;
    static thread_local std::vector<float> scratch;
    const long rows = shape[0], stride = shape[1], groups = shape[2] / kGroup;
    const Weights weights{packed, groups, shape[3]};
    scratch.resize(rows * groups);
    float* sums = scratch.data();
    const long chunk = rows * shape[2] > kAlone ? kRows : rows;
    parallel_for(rows ? (rows + chunk - 1) / chunk : 0, [&](long at) {
        for (long row = at * chunk; row < std::min(rows, (at + 1) * chunk); row++)
            sum_groups(x + row * stride, groups, sums + row * groups);
    });
    const long tiles = (weights.outputs + kTile * kPanel - 1) / (kTile * kPanel);
    parallel_for(rows ? tiles : 0, [&](long tile) {
        const __m512bh* unpacked = rows > kRows ? unpack(weights, tile) : nullptr;
        for (long row = 0; row < rows; row += kRows) {
            const Rows part{x + row * stride, stride, sums + row * groups, y + row * weights.outputs};
            kProducts[std::min<long>(rows - row, kRows) - 1](weights, tile, unpacked, part);
        }
    });
}
