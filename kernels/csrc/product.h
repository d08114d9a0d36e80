// y = x W^T for x and y in bfloat16 and W in 4, 8 or 16 bits, a tile of 32 rows of W at a time. Formats: q4.cpp, q8.cpp,
// b16.cpp.
//
// Nothing but y is rounded: the integers are exact in bfloat16, so vdpbf16ps sums q x over a group of columns in float32,
// and what the group shares joins after it: y = sum over groups of scale * (sum of q x), for 4 bits + minimum * (sum of x).
// Each y is the same chain of sums whatever other rows x has.
#pragma once
#include "common.h"

namespace shoal {

constexpr int kPanel = 16, kTile = 2, kTileRows = kPanel * kTile;  // panels: rows of W that share a vector
constexpr int kStep = 32;                                           // columns that are summed up together

struct Weight {  // mirrored in kernels/native.py
    const uint8_t* data;
    long bits, inputs, outputs;
    long group;   // columns that share a scale; of 16 bits: all of them
    long minima;  // whether they share a minimum, too: where there are 4 bits, they always do

    long tiles() const { return (outputs + kTileRows - 1) / kTileRows; }
    long groups() const { return inputs / group; }
};

struct Rows {
    const bf16* x;
    long count, stride;
    const float* sums;  // [count, inputs / 32] of x over 32 columns each: where W has minima
    bf16* y;            // the tile's columns
    long y_stride;
};

// What the tile's rows past the last of W hold is not stored.
void multiply_q4(const Weight& weight, long tile, const Rows& rows);
void multiply_q8(const Weight& weight, long tile, const Rows& rows);
void multiply_b16(const Weight& weight, long tile, const Rows& rows);
inline void multiply(const Weight& weight, long tile, const Rows& rows) {
    (weight.bits == 4 ? multiply_q4 : weight.bits == 8 ? multiply_q8 : multiply_b16)(weight, tile, rows);
}

// Sums of one row of x over each 32 columns.
void sum_steps(const bf16* x, long steps, float* sums);

}  // namespace shoal
