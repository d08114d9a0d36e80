// The product of all tiles on torch's threads.
#include "product.h"

#include <algorithm>
#include <vector>

namespace shoal {

void sum_steps(const bf16* x, long steps, float* sums) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (long first = 0; first < steps; first += 4) {
        const long count = std::min(steps - first, 4L);
        __m512 lanes[4];
        for (long i = 0; i < 4; i++) {
            const __m512bh columns = (__m512bh)_mm512_loadu_si512(x + (first + std::min(i, count - 1)) * kStep);
            lanes[i] = _mm512_dpbf16_ps(_mm512_setzero_ps(), columns, ones);
        }
        _mm_mask_storeu_ps(sums + first, (1u << count) - 1, sum_each(lanes));
    }
}

}  // namespace shoal

// y [rows, outputs] = x [rows, inputs] W^T; a row of x starts `stride` numbers after the one before.
extern "C" void shoal_product(shoal::bf16* y, const shoal::bf16* x, const shoal::Weight* weight, long count, long stride) {
    using namespace shoal;
    constexpr long kAlone = 1 << 14, kChunk = 8;  // numbers that one thread adds up sooner than it wakes the others
    static thread_local std::vector<float> scratch;
    const long steps = weight->inputs / kStep;
    float* sums = nullptr;
    if (weight->minima) {
        scratch.resize(count * steps);
        sums = scratch.data();
        const long chunk = count * weight->inputs > kAlone ? kChunk : std::max(count, 1L);
        parallel_for((count + chunk - 1) / chunk, [&](long at) {
            for (long row = at * chunk; row < std::min(count, (at + 1) * chunk); row++)
                sum_steps(x + row * stride, steps, sums + row * steps);
        });
    }
    parallel_for(count ? weight->tiles() : 0, [&](long tile) {
        multiply(*weight, tile, {x, count, stride, sums, y + tile * kTileRows, weight->outputs});
    });
}
