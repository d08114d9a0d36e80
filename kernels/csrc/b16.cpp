// 16-bit weights as they are, in bfloat16.
//
// A tile is 2 panels of 16 rows of W; two columns of it lie one after the other: 32 numbers a panel, number 2 j + b being
// row j's, of column 2 p + b. That is what vdpbf16ps takes, so a product reads the weights once, in order, at the memory's
// speed, where a library's product for one row reads a row of W at a time.
#include "tiles.h"

namespace shoal {
namespace {

struct B16 {
    static constexpr int kColumns = kStep;  // that are summed up before the loop looks round
    static constexpr int kPanelBytes = 2 * kPanel * sizeof(bf16), kPairBytes = kTile * kPanelBytes;

    static const uint8_t* at(const Weight& weight, long tile, long) {
        return weight.data + tile * weight.inputs / 2 * kPairBytes;
    }

    template <class Take>
    SHOAL_INLINE static void each_pair(const uint8_t* tile, long step, const Take& take) {
        const uint8_t* data = tile + step * (kColumns / 2) * kPairBytes;
#pragma GCC unroll 4
        for (int pair = 0; pair < kColumns / 2; pair++, data += kPairBytes) {
            fetch_ahead<kPairBytes, kAhead>(data);
            take(pair, (__m512bh)_mm512_loadu_si512(data), (__m512bh)_mm512_loadu_si512(data + kPanelBytes));
        }
    }

    template <int R>
    SHOAL_INLINE static void join(__m512 (&totals)[R][kTile], const __m512 (&sums)[R][kTile], const uint8_t*, const float*,
                                  long, long) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int panel = 0; panel < kTile; panel++) totals[r][panel] = sums[r][panel];  // there is one group
    }

    static constexpr int kAhead = 16;  // pairs: 2 KiB
};

}  // namespace

void multiply_b16(const Weight& weight, long tile, const Rows& rows) { multiply_tile<B16>(weight, tile, rows); }

}  // namespace shoal
