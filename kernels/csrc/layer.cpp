// The two halves of a decoder layer, between which ranks add up what they have, each in one call and one parallel region.
// In torch's way a layer is nine calls, and at one token a step they cost more than its arithmetic.
//
// The steps are those of the other kernels, on the same tiles and with the same roundings: the bits are the same as theirs.
// Scratch grows to the largest step and stays.
#include "attention.h"
#include "elementwise.h"
#include "product.h"
#include "team.h"

namespace shoal {

struct MlpLayer {  // mirrored in kernels/native_layer.py
    const float* norm;
    Weight up, down;  // up: gate, then up
    float eps;
};

struct AttendLayer {  // mirrored in kernels/native_layer.py
    const float* norm;
    Weight qkv[3], out;  // qkv: one under the other, the last ones of no outputs where they are stored alike
    const float *q_norm, *k_norm;  // [dim], of each head; null: none
    const float* angles;           // [positions, rotated]: cosines, then sines; null: no rotation
    long rotated;
    float eps, head_eps;
};

struct DecodeRows {  // mirrored in kernels/native_layer.py
    const int64_t *positions, *slots;  // slot -1: nothing is stored
};

namespace {

template <class Number>
Number* grown(std::vector<Number>& scratch, long size) {
    if ((long)scratch.size() < size) scratch.resize(size);
    return scratch.data();
}

// What a product reads: rows of one width, and their sums.
struct Input {
    bf16* x;
    float* sums;
    long width;

    Input(std::vector<bf16>& numbers, std::vector<float>& sums, long rows, long width)
        : x(grown(numbers, rows * width)), sums(grown(sums, rows * width / kStep)), width(width) {}

    bf16* row(long i) const { return x + i * width; }
    void sum(long i) const { sum_steps(row(i), width / kStep, sums + i * width / kStep); }
    Rows rows(long count, bf16* y, long y_stride) const { return {x, count, width, sums, y, y_stride}; }
};

// delta is added to the residual, the sum's norm is the input of what follows.
void enter(const Input& input, const bf16* delta, float* residual, const float* weight, float eps, long row) {
    norm_row(input.row(row), delta + row * input.width, residual + row * input.width, weight, input.width, eps);
    input.sum(row);
}

void mlp_half(bf16* delta, float* residual, const MlpLayer& layer, long count) {
    static thread_local std::vector<bf16> entered, activated;
    static thread_local std::vector<float> entered_sums, activated_sums;
    const Input x(entered, entered_sums, count, layer.up.inputs);
    const Input hidden(activated, activated_sums, count, layer.down.inputs);
    const long half = layer.up.tiles() / 2;
    Team::run([&](Team::Member& team) {
        team.each(count, [&](long row) { enter(x, delta, residual, layer.norm, layer.eps, row); });
        team.each(half, [&](long tile) {
            static thread_local std::vector<bf16> scratch;
            bf16 *gate = grown(scratch, 2 * kTileRows * count), *up = gate + kTileRows;
            multiply(layer.up, tile, x.rows(count, gate, 2 * kTileRows));
            multiply(layer.up, half + tile, x.rows(count, up, 2 * kTileRows));
            for (long row = 0; row < count; row++, gate += 2 * kTileRows, up += 2 * kTileRows) {
                bf16* out = hidden.row(row) + tile * kTileRows;
                for (int i = 0; i < kTileRows; i += 16) gate_16(out + i, gate + i, up + i);
                sum_steps(out, 1, hidden.sums + row * half + tile);
            }
        });
        team.each(layer.down.tiles(), [&](long tile) {
            multiply(layer.down, tile, hidden.rows(count, delta + tile * kTileRows, layer.down.outputs));
        });
    });
}

// A tile of weights that lie one under the other; y is the first one's first column.
void multiply_stacked(const Weight (&parts)[3], long tile, const Input& x, long count, bf16* y, long y_stride) {
    for (const Weight& part : parts) {
        if (tile < part.tiles()) return multiply(part, tile, x.rows(count, y + tile * kTileRows, y_stride));
        tile -= part.tiles();
        y += part.outputs;
    }
}

// One head of queries or keys, normalised and rotated as the layer asks, into `out`.
void turn(bf16* out, const bf16* head, const AttendLayer& layer, const float* norm, long position, long dim) {
    if (norm)
        norm_row(out, head, nullptr, norm, dim, layer.head_eps);
    else
        std::copy(head, head + dim, out);
    const float* angles = layer.angles + position * layer.rotated;
    if (layer.angles) rotate(out, angles, angles + layer.rotated / 2, layer.rotated / 2);
}

template <class S>
struct Attend {
    const AttendLayer& layer;
    const DecodeRows& rows;
    const DecodeShape& shape;
    const KvLayer& kv;
    const bf16* qkv;
    const Decode<bf16, S> decode{shape, kv};

    // A task's queries; its key and value, too, if it is the one that looks at them.
    void part(long number) const {
        const auto [seq, kv_head, split] = decode.task(number);
        const long group = shape.heads / shape.kv_heads, position = rows.positions[seq];
        const bf16* own = qkv + seq * shape.query_stride;
        static thread_local std::vector<bf16> scratch;
        bf16* queries = grown(scratch, group * shape.dim);
        for (long head = 0; head < group; head++) {
            const bf16* query = own + (kv_head * group + head) * shape.dim;
            turn(queries + head * shape.dim, query, layer, layer.q_norm, position, shape.dim);
        }
        if (rows.slots[seq] >= 0 && split == (shape.lens[seq] - 1) / kSplit) store_kv(own, seq, kv_head, position);
        decode.part(number, queries);
    }

    void store_kv(const bf16* own, long seq, long kv_head, long position) const {
        const long page = rows.slots[seq] / shape.page_size, offset = rows.slots[seq] % shape.page_size;
        const long token = (page * shape.kv_heads + kv_head) * shape.page_size + offset, at = token * shape.dim;
        const bf16 *key = own + (shape.heads + kv_head) * shape.dim, *value = key + shape.kv_heads * shape.dim;
        S *k_cache = (S*)kv.k + at, *v_cache = (S*)kv.v + at;
        if constexpr (kCoded<S>) {
            static thread_local std::vector<bf16> scratch;
            bf16* turned = grown(scratch, shape.dim);
            turn(turned, key, layer, layer.k_norm, position, shape.dim);
            kv.k_scales[token] = encode(k_cache, turned, shape.dim);
            kv.v_scales[token] = encode(v_cache, value, shape.dim);
        } else {
            turn(k_cache, key, layer, layer.k_norm, position, shape.dim);
            std::copy(value, value + shape.dim, v_cache);
        }
    }
};

template <class S>
void attend_half(bf16* delta, float* residual, const KvLayer& kv, const AttendLayer& layer, const DecodeRows& rows,
                 const DecodeShape& shape) {
    static thread_local std::vector<bf16> entered, projected, attended;
    static thread_local std::vector<float> entered_sums, attended_sums;
    const long count = shape.seqs;
    const Input x(entered, entered_sums, count, layer.qkv[0].inputs);
    const Input heads(attended, attended_sums, count, layer.out.inputs);
    long outputs = 0, tiles = 0;
    for (const Weight& part : layer.qkv) outputs += part.outputs, tiles += part.tiles();
    bf16* qkv = grown(projected, count * outputs);
    const Attend<S> attend{layer, rows, shape, kv, qkv};
    Team::run([&](Team::Member& team) {
        team.each(count, [&](long row) { enter(x, delta, residual, layer.norm, layer.eps, row); });
        team.each(tiles, [&](long tile) { multiply_stacked(layer.qkv, tile, x, count, qkv, outputs); });
        team.each(attend.decode.tasks(), [&](long task) { attend.part(task); });
        team.each(count, [&](long row) {
            for (long head = 0; head < shape.heads; head++) attend.decode.merge(row, head, heads.row(row) + head * shape.dim);
            heads.sum(row);
        });
        team.each(layer.out.tiles(), [&](long tile) {
            multiply(layer.out, tile, heads.rows(count, delta + tile * kTileRows, layer.out.outputs));
        });
    });
}

}  // namespace
}  // namespace shoal

// x = norm(residual += delta); delta = down(silu(gate(x)) * up(x)), of `count` rows. delta bfloat16, residual float32.
extern "C" void shoal_mlp(shoal::bf16* delta, float* residual, const shoal::MlpLayer* layer, long count) {
    if (count) shoal::mlp_half(delta, residual, *layer, count);
}

// x = norm(residual += delta); delta = out(attention(qkv(x))), of one token a sequence, whose key and value are stored.
// Rows of `shape`'s queries are those of qkv's output.
extern "C" void shoal_attend(shoal::bf16* delta, float* residual, const shoal::KvLayer* kv, const shoal::AttendLayer* layer,
                             const shoal::DecodeRows* rows, const shoal::DecodeShape* shape) {
    if (!shape->seqs) return;
    shoal::with_stored(*kv, [&](auto stored) {
        shoal::attend_half<decltype(stored)>(delta, residual, *kv, *layer, *rows, *shape);
    });
}
