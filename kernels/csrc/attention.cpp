// Attention of one new token a sequence on its own; fused with what surrounds it: layer.cpp.
#include "attention.h"

namespace shoal {
namespace {

template <class T, class S>
void decode(void* out, const void* q, const KvLayer& kv, const DecodeShape& shape) {
    const Decode<T, S> decode(shape, kv);
    const long group = shape.heads / shape.kv_heads;
    parallel_for(decode.tasks(), [&](long number) {
        const auto task = decode.task(number);
        decode.part(number, (const T*)q + task.seq * shape.query_stride + task.kv_head * group * shape.dim);
    });
    for (long seq = 0; seq < shape.seqs; seq++)
        for (long head = 0; head < shape.heads; head++)
            decode.merge(seq, head, (T*)out + (seq * shape.heads + head) * shape.dim);
}

}  // namespace
}  // namespace shoal

// out [seqs, heads, dim], contiguous; q [seqs, heads, dim], a token `query_stride` numbers after the other. dim is a multiple
// of 16. All of one type, but codes, which are for bfloat16.
extern "C" void shoal_decode_bf16(void* out, const void* q, const shoal::KvLayer* kv, const shoal::DecodeShape* shape) {
    shoal::with_stored(*kv, [&](auto stored) { shoal::decode<shoal::bf16, decltype(stored)>(out, q, *kv, *shape); });
}
extern "C" void shoal_decode_fp16(void* out, const void* q, const shoal::KvLayer* kv, const shoal::DecodeShape* shape) {
    shoal::decode<shoal::fp16, shoal::fp16>(out, q, *kv, *shape);
}
extern "C" void shoal_decode_fp32(void* out, const void* q, const shoal::KvLayer* kv, const shoal::DecodeShape* shape) {
    shoal::decode<float, float>(out, q, *kv, *shape);
}
