// Attention of one sequence's new tokens over its pages, in bfloat16 (flash attention, Dao et al. 2022): blocks of keys in
// order of position, with a running maximum and sum for each row.
//
// Keys and values are first laid out for vdpbf16ps, 32 keys at a time, once for all rows. Blocks are cut at fixed positions
// and a masked key adds nothing, so a token's result depends neither on the tokens beside it nor on how a prompt is cut.
#include <cstring>
#include <vector>

#include "attention.h"
#include "team.h"
#include "tiles.h"

namespace shoal {

struct PrefillShape {  // mirrored in kernels/native.py
    const int32_t* table;  // [pages]
    long tokens, keys;     // new ones, and all
    long heads, kv_heads, dim, page_size, query_stride;
    long window;           // keys that a token sees; 0: all
    float scale, softcap;  // softcap 0: none
};

namespace {

constexpr long kKeys = 128;        // a block: scores of 8 rows stay in the first-level cache
constexpr long kLane = kTileRows;  // keys, or dims, that two vectors hold

struct Pair {
    bf16 first, second;
};

// Where one key/value head's keys and values lie, and how they are laid out anew.
struct Packed {
    const PrefillShape& shape;
    const KvLayer& kv;
    long begin;    // the first key that is looked at, at a block's border
    Pair* keys;    // [kv heads, keys / 32, dim / 2, 32 keys]
    Pair* values;  // [kv heads, keys / 32, dim / 32, 16 pairs of keys, 32 dims]
    float *key_scales, *value_scales;  // [kv heads, keys]: of codes, which are laid out as they are; else null

    long parts() const { return (shape.keys - begin + kLane - 1) / kLane; }
    long size() const { return kLane * shape.dim / 2; }
    Pair* keys_at(long head, long part) const { return keys + (head * parts() + part) * size(); }
    Pair* values_at(long head, long part) const { return values + (head * parts() + part) * size(); }
    // Of one part, in `key_scales` or `value_scales`.
    float* scales_at(float* scales, long head, long part) const { return scales ? scales + (head * parts() + part) * kLane : nullptr; }

    // Whatever a page's last owner left behind the sequence's end becomes zero: a NaN would get past any mask.
    template <class S>
    void pack(long head, long part) const {
        const S *k = (const S*)kv.k, *v = (const S*)kv.v;
        Pair *to_keys = keys_at(head, part), *to_values = values_at(head, part);
        float* to_key_scales = scales_at(key_scales, head, part);
        float* to_value_scales = scales_at(value_scales, head, part);
        std::memset(to_keys, 0, size() * sizeof(Pair));
        std::memset(to_values, 0, size() * sizeof(Pair));
        if constexpr (kCoded<S>) {
            std::fill_n(to_key_scales, kLane, 0.0f);
            std::fill_n(to_value_scales, kLane, 0.0f);
        }
        const long first = begin + part * kLane, count = std::min(kLane, shape.keys - first);
        for (long i = 0; i < count; i++) {
            const long key = first + i, page = shape.table[key / shape.page_size], offset = key % shape.page_size;
            const long token = (page * shape.kv_heads + head) * shape.page_size + offset, at = token * shape.dim;
            if constexpr (kCoded<S>) {
                to_key_scales[i] = kv.k_scales[token];
                to_value_scales[i] = kv.v_scales[token];
            }
            for (long pair = 0; pair < shape.dim / 2; pair++)
                to_keys[pair * kLane + i] = {as_bf16(k[at + 2 * pair]), as_bf16(k[at + 2 * pair + 1])};
            for (long e = 0; e < shape.dim; e++) {
                Pair& to = to_values[(e / kLane * kLane / 2 + i / 2) * kLane + e % kLane];
                (i % 2 ? to.second : to.first) = as_bf16(v[at + e]);
            }
        }
    }
};

// Sums += rows of x, `pairs` pairs each, by operands of 32 columns.
inline void add_pairs(__m512 (&sums)[kRows][kTile], const Pair* operands, const bf16* x, long pairs, long stride) {
    for (long pair = 0; pair < pairs; pair++, operands += kLane) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(operands), second = (__m512bh)_mm512_loadu_si512(operands + 16);
        add<kRows>(sums, first, second, x + 2 * pair, stride);
    }
}

// Eight query rows of one head.
struct Block {
    const PrefillShape& shape;
    long first;  // position of the first row
    float max[kRows], total[kRows], share[kRows];
    float scores[kRows][kKeys];
    bf16 weights[kRows][kKeys];
    std::vector<bf16>& queries;  // [rows, dim]
    std::vector<float>& sums;    // [rows, dim]

    // Scores of `count` keys, which lie in whole parts.
    void score(const Pair* keys, long count) {
        for (long part = 0; part < count; part += kLane, keys += kLane * shape.dim / 2) {
            __m512 found[kRows][kTile];
            for (auto& row : found) row[0] = row[1] = _mm512_setzero_ps();
            add_pairs(found, keys, queries.data(), shape.dim / 2, shape.dim);
            for (int r = 0; r < kRows; r++) store(&scores[r][part], found[r][0]), store(&scores[r][part + 16], found[r][1]);
        }
    }

    // Which of 16 keys from `key` on a row sees.
    __mmask16 visible(int row, long key) const {
        const long last = first + row - key, hidden = shape.window ? last - shape.window + 1 : 0;
        const auto below = [](long count) { return (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1); };
        return below(last + 1) & ~below(hidden);
    }

    // Scores become weights; what was summed before is worth `share` of itself. A value's scale goes to its weight, whose
    // mass is counted.
    void weigh(int r, long key, long count, const float* key_scales, const float* value_scales) {
        const __m512 scale = _mm512_set1_ps(shape.scale * kLog2E), least = _mm512_set1_ps(-INFINITY);
        __m512 highest = least, sum = _mm512_setzero_ps();
        for (long i = 0; i < count; i += 16) {
            __m512 score = _mm512_mul_ps(load(&scores[r][i]), scale);
            if (key_scales) score = _mm512_mul_ps(score, load(key_scales + i));
            if (shape.softcap != 0) score = capped(score, shape.softcap);
            score = _mm512_mask_mov_ps(least, visible(r, key + i), score);
            store(&scores[r][i], score);
            highest = _mm512_max_ps(highest, score);
        }
        const float top = std::max(max[r], _mm512_reduce_max_ps(highest));
        for (long i = 0; i < count; i += 16) {
            const __m512 weight = exp2(_mm512_sub_ps(load(&scores[r][i]), _mm512_set1_ps(top)));
            store(&weights[r][i], value_scales ? _mm512_mul_ps(weight, load(value_scales + i)) : weight);
            sum = _mm512_add_ps(sum, weight);
        }
        share[r] = std::exp2(max[r] - top);
        total[r] = total[r] * share[r] + _mm512_reduce_add_ps(sum);
        max[r] = top;
    }

    void sum_values(const Pair* values, long count) {
        for (long e = 0; e < shape.dim; e += kLane) {
            __m512 found[kRows][kTile];
            for (int r = 0; r < kRows; r++)
                for (int i = 0; i < kTile; i++)
                    found[r][i] = _mm512_mul_ps(load(&sums[r * shape.dim + e + 16 * i]), _mm512_set1_ps(share[r]));
            for (long part = 0; part < count; part += kLane)
                add_pairs(found, values + part * shape.dim / 2 + e * kLane / 2, &weights[0][part], kLane / 2, kKeys);
            for (int r = 0; r < kRows; r++)
                for (int i = 0; i < kTile; i++) store(&sums[r * shape.dim + e + 16 * i], found[r][i]);
        }
    }
};

// Rows `row` to `row + 8`, as far as there are, of one query head.
void attend_rows(bf16* out, const bf16* q, const Packed& packed, long head, long row) {
    const PrefillShape& shape = packed.shape;
    const long rows = std::min<long>(kRows, shape.tokens - row), kv_head = head / (shape.heads / shape.kv_heads);
    static thread_local std::vector<bf16> queries;
    static thread_local std::vector<float> sums;
    queries.resize(kRows * shape.dim);
    sums.assign(kRows * shape.dim, 0);
    for (long r = 0; r < kRows; r++)  // the last ones stand in for those that there are not
        std::memcpy(&queries[r * shape.dim], q + (row + std::min(r, rows - 1)) * shape.query_stride + head * shape.dim,
                    shape.dim * sizeof(bf16));
    Block block{shape, shape.keys - shape.tokens + row, .queries = queries, .sums = sums};
    std::fill_n(block.max, kRows, -1e30f);  // finite: before a row's window nothing is seen
    std::fill_n(block.total, kRows, 0.0f);
    const long end = block.first + rows, low = shape.window ? std::max(0L, block.first - shape.window + 1) : 0;
    for (long key = low / kKeys * kKeys; key < end; key += kKeys) {
        const long part = (key - packed.begin) / kLane, count = (std::min(kKeys, end - key) + kLane - 1) / kLane * kLane;
        block.score(packed.keys_at(kv_head, part), count);
        const float* key_scales = packed.scales_at(packed.key_scales, kv_head, part);
        const float* value_scales = packed.scales_at(packed.value_scales, kv_head, part);
        for (int r = 0; r < kRows; r++) block.weigh(r, key, count, key_scales, value_scales);
        block.sum_values(packed.values_at(kv_head, part), count);
    }
    for (long r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(1 / block.total[r]);
        for (long e = 0; e < shape.dim; e += 16)
            store(out + ((row + r) * shape.heads + head) * shape.dim + e, _mm512_mul_ps(load(&sums[r * shape.dim + e]), scale));
    }
}

template <class S>
void prefill(bf16* out, const bf16* q, const KvLayer& kv, const PrefillShape& shape) {
    static thread_local std::vector<Pair> keys, values;
    static thread_local std::vector<float> key_scales, value_scales;
    const long low = shape.window ? std::max(0L, shape.keys - shape.tokens - shape.window + 1) : 0;
    Packed packed{shape, kv, low / kKeys * kKeys};
    const long parts = packed.parts(), size = shape.kv_heads * parts * packed.size();
    if ((long)keys.size() < size) keys.resize(size), values.resize(size);
    packed.keys = keys.data(), packed.values = values.data();
    if constexpr (kCoded<S>) {
        key_scales.resize(shape.kv_heads * parts * kLane), value_scales.resize(shape.kv_heads * parts * kLane);
        packed.key_scales = key_scales.data(), packed.value_scales = value_scales.data();
    }
    const long blocks = (shape.tokens + kRows - 1) / kRows;
    Team::run([&](Team::Member& team) {
        team.each(shape.kv_heads * parts, [&](long task) { packed.pack<S>(task / parts, task % parts); });
        team.each(shape.heads * blocks, [&](long task) {  // the longest first
            attend_rows(out, q, packed, task % shape.heads, (blocks - 1 - task / shape.heads) * kRows);
        });
    });
}

}  // namespace
}  // namespace shoal

// out [tokens, heads, dim], contiguous; q [tokens, heads, dim], a token `query_stride` numbers after the other. dim is a
// multiple of 32.
extern "C" void shoal_prefill(shoal::bf16* out, const shoal::bf16* q, const shoal::KvLayer* kv,
                              const shoal::PrefillShape* shape) {
    if (!shape->tokens) return;
    shoal::with_stored(*kv, [&](auto stored) { shoal::prefill<decltype(stored)>(out, q, *kv, *shape); });
}
