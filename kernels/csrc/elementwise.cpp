// What stands between a layer's products: norms, rotation, the write into the cache, SwiGLU. In torch each is a handful of
// calls, which cost more than the arithmetic when few tokens are decoded. Numbers are computed in float32 and rounded once.
#include "elementwise.h"

#include <algorithm>
#include <cstring>

#include "cache.h"

namespace shoal {
namespace {

// body(row) for all rows of `size` numbers each, on more threads than one where that saves time.
template <class Body>
void for_rows(long rows, long size, const Body& body) {
    constexpr long kAlone = 1 << 16, kChunk = 1 << 13;
    const long chunk = rows * size < kAlone ? std::max(rows, 1L) : std::max(kChunk / size, 1L);
    parallel_for((rows + chunk - 1) / chunk, [&](long at) {
        for (long row = at * chunk; row < std::min(rows, (at + 1) * chunk); row++) body(row);
    });
}

// shape: tokens, heads, dim, and the numbers from one token of x, one head of x to the next. out is contiguous.
template <class T>
void norm(void* out, const void* x, float* residual, const float* weight, float eps, const long* shape) {
    const long heads = shape[1], dim = shape[2];
    for_rows(shape[0] * heads, dim, [&](long row) {
        const T* from = (const T*)x + row / heads * shape[3] + row % heads * shape[4];
        norm_row((T*)out + row * dim, from, residual ? residual + row * dim : nullptr, weight, dim, eps);
    });
}

// shape: tokens, heads of q, of k, rotated dims, and the numbers from token to token and head to head of q and of k.
template <class T>
void rope(void* q, void* k, const int64_t* positions, const float* table, const long* shape) {
    const long heads = shape[1], kv_heads = shape[2], dims = shape[3];
    for_rows(shape[0], (heads + kv_heads) * dims, [&](long token) {
        const float *cos = table + positions[token] * dims, *sin = cos + dims / 2;
        for (long head = 0; head < heads; head++)
            rotate((T*)q + token * shape[4] + head * shape[5], cos, sin, dims / 2);
        for (long head = 0; head < kv_heads; head++)
            rotate((T*)k + token * shape[6] + head * shape[7], cos, sin, dims / 2);
    });
}

// silu(gate) * up of rows [gate, up]. shape: rows, columns of the result, numbers from one row of x to the next.
template <class T>
void swiglu(void* out, const void* x, const long* shape) {
    const long columns = shape[1];
    for_rows(shape[0], 4 * columns, [&](long row) {  // an exponential counts for a few numbers
        const T* gate = (const T*)x + row * shape[2];
        for (long i = 0; i < columns; i += 16) gate_16((T*)out + row * columns + i, gate + i, gate + columns + i);
    });
}

}  // namespace
}  // namespace shoal

#define FOR_TYPE(NAME, TYPE)                                                                                             \
    extern "C" void shoal_norm_##NAME(void* out, const void* x, float* residual, const float* weight, float eps,        \
                                      const long* shape) {                                                              \
        shoal::norm<TYPE>(out, x, residual, weight, eps, shape);                                                        \
    }                                                                                                                   \
    extern "C" void shoal_rope_##NAME(void* q, void* k, const int64_t* positions, const float* table, const long* shape) { \
        shoal::rope<TYPE>(q, k, positions, table, shape);                                                               \
    }                                                                                                                   \
    extern "C" void shoal_swiglu_##NAME(void* out, const void* x, const long* shape) { shoal::swiglu<TYPE>(out, x, shape); }

FOR_TYPE(bf16, shoal::bf16)
FOR_TYPE(fp16, shoal::fp16)
FOR_TYPE(fp32, float)

namespace shoal {
namespace {

// take(head of the new keys or values, where it is stored, its number among all heads of all slots), for keys, then values.
template <class Take>
void each_head(const KvLayer& kv, const char* k, const char* v, const int64_t* slots, const long* shape, const Take& take) {
    const long kv_heads = shape[1], page_size = shape[2], bytes = shape[3];
    for_rows(shape[0], kv_heads * bytes, [&](long token) {
        if (slots[token] < 0) return;
        const long page = slots[token] / page_size, offset = slots[token] % page_size;
        for (long head = 0; head < kv_heads; head++) {
            const long at = (page * kv_heads + head) * page_size + offset;
            take(k + token * shape[4] + head * bytes, kv.k, kv.k_scales, at);
            take(v + token * shape[5] + head * bytes, kv.v, kv.v_scales, at);
        }
    });
}

template <class S>
void write_codes(const KvLayer& kv, const char* k, const char* v, const int64_t* slots, const long* shape) {
    const long dim = shape[3] / sizeof(bf16);
    each_head(kv, k, v, slots, shape, [&](const char* from, void* cache, float* scales, long at) {
        scales[at] = encode((S*)cache + at * dim, (const bf16*)from, dim);
    });
}

}  // namespace
}  // namespace shoal

// Heads into their slots of a cache; slot -1: nowhere. shape: tokens, kv heads, page size, bytes of a head, and the bytes
// from one token of k, and of v, to the next. Heads lie side by side; those that become codes are bfloat16.
extern "C" void shoal_write_kv(const shoal::KvLayer* kv, const char* k, const char* v, const int64_t* slots,
                               const long* shape) {
    using namespace shoal;
    switch (kv->code) {
        case kInt8: return write_codes<int8>(*kv, k, v, slots, shape);
        case kFp8: return write_codes<fp8>(*kv, k, v, slots, shape);
        default:
            each_head(*kv, k, v, slots, shape, [&](const char* from, void* cache, float*, long at) {
                std::memcpy((char*)cache + at * shape[3], from, shape[3]);
            });
    }
}
