// Attention of one new token a sequence on its own; fused with what surrounds it: layer.cpp.
#include "attention.h"

namespace shoal {
namespace {

template <class T>
void decode(void* out, const void* q, const void* k, const void* v, const DecodeShape& shape) {
    const Decode<T> decode(shape, k, v);
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

// out [seqs, heads, dim], contiguous; q [seqs, heads, dim], a token `query_stride` numbers after the other; k and v
// [pages, kv heads, page size, dim]. dim is a multiple of 16. All of one type.
extern "C" void shoal_decode_bf16(void* out, const void* q, const void* k, const void* v, const shoal::DecodeShape* shape) {
    shoal::decode<shoal::bf16>(out, q, k, v, *shape);
}
extern "C" void shoal_decode_fp16(void* out, const void* q, const void* k, const void* v, const shoal::DecodeShape* shape) {
    shoal::decode<shoal::fp16>(out, q, k, v, *shape);
}
extern "C" void shoal_decode_fp32(void* out, const void* q, const void* k, const void* v, const shoal::DecodeShape* shape) {
    shoal::decode<float>(out, q, k, v, *shape);
}
