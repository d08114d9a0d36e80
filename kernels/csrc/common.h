// What the CPU kernels share: number formats, and the team of threads. Needs AVX-512 F, BW, DQ, VL and BF16.
//
// Kernels are C functions on plain pointers, called through ctypes (kernels/native.py). Each result depends on its own
// row alone: neither the batch nor the number of threads changes an order of summation.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

// libgomp's own entry point, found in the copy that torch has loaded: the kernels then run on torch's team. A team of
// our own would make OpenMP count more threads than cores, and put all of them to sleep after each operation. Weak: with
// another OpenMP underneath, kernels run on one thread.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned num_threads, unsigned flags) __attribute__((weak));

namespace shoal {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load(const bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
inline __m512 load(const fp16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
inline void store(fp16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

// Sums of the 16 lanes of each of four vectors.
inline __m128 sum_each(const __m512* v) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d abd = _mm512_castps_pd(ab), cdd = _mm512_castps_pd(cd);
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(abd, cdd)), high = _mm512_castpd_ps(_mm512_unpackhi_pd(abd, cdd));
    const __m512 all = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// 2^x for any x: a polynomial on [-0.5, 0.5] of relative error 2e-7 (Cephes exp2f), scaled by the integer part.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.339887440266574e-3f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.618437357674640e-3f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.550332471162809e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.402264791363012e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.931472028550421e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// body(i) for every i below count, on torch's threads. Whoever is free takes the next few: a core may be busy elsewhere.
template <class Body>
void parallel_for(long count, const Body& body) {
    struct Shared {
        const Body& body;
        long count, few;
        std::atomic<long> next{0};
    } shared{body, count, count / 64 + 1};
    const auto work = [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        for (long first; (first = all.next.fetch_add(all.few, std::memory_order_relaxed)) < all.count;)
            for (long i = first; i < std::min(first + all.few, all.count); i++) all.body(i);
    };
    if (count > 1 && GOMP_parallel)
        GOMP_parallel(work, &shared, 0, 0);  // 0: as many as torch.set_num_threads says
    else
        work(&shared);
}

}  // namespace shoal
