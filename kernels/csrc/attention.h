// Attention of one new token a sequence, straight from the pages of the cache: nothing is gathered, and what lies beyond
// a sequence's end is never read. Query heads of a group share what is loaded of their key/value head.
//
// A task is 512 keys of one sequence and key/value head; where a sequence has more, the parts' sums are merged with their
// maxima (flash decoding, Dao et al. 2023). The cut depends on the position of a key alone, not on the batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cache.h"

namespace shoal {

struct DecodeShape {  // mirrored in kernels/native.py
    const int32_t* table;  // [seqs, table_stride] pages
    const int32_t* lens;   // [seqs] keys
    long seqs, table_stride, heads, kv_heads, dim, page_size, query_stride;
    long window;  // keys that a token sees; 0: all
    long max_len;
    float scale, softcap;  // softcap 0: none
};

constexpr long kSplit = 512;
constexpr int kHeads = 4;     // query heads at once: 4 x 4 sums in registers
constexpr float kLog2E = 1.44269504088896341f;

// Keys of one page that a task looks at.
template <class S>
struct Run {
    const S *k, *v;
    const float *k_scales, *v_scales;  // of codes
    long count;
};

// Four keys' products with G queries. `scores` has room for 4 a head; keys past `count` repeat the last one.
template <class S, int G>
inline void four_scores(const float* q, const S* k, long count, long dim, float* scores) {
    const S* keys[4];
    for (long i = 0; i < 4; i++) keys[i] = k + std::min(i, count - 1) * dim;
    __m512 sums[G][4];
    for (auto& head : sums)
        for (auto& sum : head) sum = _mm512_setzero_ps();
    for (long e = 0; e < dim; e += 16) {
        const __m512 k0 = load(keys[0] + e), k1 = load(keys[1] + e), k2 = load(keys[2] + e), k3 = load(keys[3] + e);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            const __m512 query = _mm512_loadu_ps(q + g * dim + e);
            sums[g][0] = _mm512_fmadd_ps(query, k0, sums[g][0]);
            sums[g][1] = _mm512_fmadd_ps(query, k1, sums[g][1]);
            sums[g][2] = _mm512_fmadd_ps(query, k2, sums[g][2]);
            sums[g][3] = _mm512_fmadd_ps(query, k3, sums[g][3]);
        }
    }
    for (int g = 0; g < G; g++) _mm_storeu_ps(scores + g * (kSplit + 16), sum_each(sums[g]));
}

// softcap * tanh(score / softcap); scores are in units of log(2), for exp2.
inline __m512 capped(__m512 score, float softcap) {
    const __m512 two = _mm512_set1_ps(2), one = _mm512_set1_ps(1);
    const __m512 grown = exp2(_mm512_mul_ps(score, _mm512_set1_ps(2 / softcap)));  // exp(2 score / softcap)
    const __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(grown, one)));
    return _mm512_mul_ps(tanh, _mm512_set1_ps(softcap * kLog2E));
}

struct Mass {
    float max, sum;
};

// Scores become 2^(score - max), in place; 16 past the end are cleared.
inline Mass weigh(float* scores, long count, float softcap) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 max = least, sum = _mm512_setzero_ps();
    for (long i = 0; i < count; i += 16) {
        const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
        __m512 score = _mm512_mask_loadu_ps(least, mask, scores + i);
        if (softcap != 0) score = _mm512_mask_mov_ps(least, mask, capped(score, softcap));
        _mm512_storeu_ps(scores + i, score);
        max = _mm512_max_ps(max, score);
    }
    const float top = _mm512_reduce_max_ps(max);
    for (long i = 0; i < count; i += 16) {
        const __m512 weight = exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(top)));
        _mm512_storeu_ps(scores + i, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    return {top, _mm512_reduce_add_ps(sum)};
}

// G heads' weighted sums over the runs of V vectors of 16 values.
template <class S, int G, int V>
void sum_values(const std::vector<Run<S>>& runs, const float* weights, long first, long dim, float* out) {
    __m512 sums[G][V];
    for (auto& head : sums)
        for (auto& sum : head) sum = _mm512_setzero_ps();
    for (const Run<S>& run : runs) {
        const S* v = run.v + first;
        for (long key = 0; key < run.count; key++, v += dim, weights++) {
            __m512 values[V];
            for (int i = 0; i < V; i++) values[i] = load(v + 16 * i);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                const __m512 weight = _mm512_set1_ps(weights[g * (kSplit + 16)]);
#pragma GCC unroll 4
                for (int i = 0; i < V; i++) sums[g][i] = _mm512_fmadd_ps(weight, values[i], sums[g][i]);
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int i = 0; i < V; i++) _mm512_storeu_ps(out + g * dim + first + 16 * i, sums[g][i]);
}

// G query heads over one task's keys: sums [G, dim], not yet divided by their weight.
template <class S, int G>
void attend(const std::vector<Run<S>>& runs, const float* q, const DecodeShape& shape, float* out, Mass* mass) {
    alignas(64) float scores[G][kSplit + 16];
    long count = 0;
    for (const Run<S>& run : runs) {
        for (long key = 0; key < run.count; key += 4)
            four_scores<S, G>(q, run.k + key * shape.dim, run.count - key, shape.dim, scores[0] + count + key);
        if constexpr (kCoded<S>)
            for (int g = 0; g < G; g++) multiply_by(scores[g] + count, run.k_scales, run.count);
        count += run.count;
    }
    for (int g = 0; g < G; g++) mass[g] = weigh(scores[g], count, shape.softcap);
    if constexpr (kCoded<S>) {  // a value's scale goes to its weight, whose mass is counted
        count = 0;
        for (const Run<S>& run : runs) {
            for (int g = 0; g < G; g++) multiply_by(scores[g] + count, run.v_scales, run.count);
            count += run.count;
        }
    }
    long first = 0;
    for (; first + 64 <= shape.dim; first += 64) sum_values<S, G, 4>(runs, scores[0], first, shape.dim, out);
    for (; first < shape.dim; first += 16) sum_values<S, G, 1>(runs, scores[0], first, shape.dim, out);
}

template <class S>
std::vector<Run<S>>& find_runs(const DecodeShape& shape, const KvLayer& kv, long seq, long kv_head, long begin, long end) {
    static thread_local std::vector<Run<S>> runs;
    runs.clear();
    for (long key = begin; key < end;) {
        const long page = shape.table[seq * shape.table_stride + key / shape.page_size], offset = key % shape.page_size;
        const long count = std::min(shape.page_size - offset, end - key);
        const long token = (page * shape.kv_heads + kv_head) * shape.page_size + offset, at = token * shape.dim;
        Run<S> run{(const S*)kv.k + at, (const S*)kv.v + at, nullptr, nullptr, count};
        if constexpr (kCoded<S>) run.k_scales = kv.k_scales + token, run.v_scales = kv.v_scales + token;
        runs.push_back(run);
        key += count;
    }
    return runs;
}

// One step's tasks: first all parts, then, with a barrier between, all merges. T: of queries and results. S: what is stored.
template <class T, class S>
class Decode {
public:
    Decode(const DecodeShape& shape, const KvLayer& kv)
        : shape(shape), kv(kv), sums(scratch<float>()), masses(scratch<Mass>()) {
        sums.resize(tasks() * group * shape.dim);
        masses.resize(tasks() * group);
    }

    struct Task {
        long seq, kv_head, split;
    };
    long tasks() const { return shape.seqs * shape.kv_heads * splits; }
    Task task(long number) const {
        return {number / splits / shape.kv_heads, number / splits % shape.kv_heads, number % splits};
    }

    // q: the task's query heads.
    void part(long number, const T* q) const {
        const auto [seq, kv_head, split] = task(number);
        const long len = shape.lens[seq], low = shape.window && len > shape.window ? len - shape.window : 0;
        const long begin = std::max(low, split * kSplit), end = std::min(len, (split + 1) * kSplit);
        Mass* mass = &masses[number * group];
        std::fill(mass, mass + group, Mass{-INFINITY, 0});
        if (begin >= end) return;
        const auto& runs = find_runs<S>(shape, kv, seq, kv_head, begin, end);
        static thread_local std::vector<float> queries;
        queries.resize(group * shape.dim);
        const __m512 scale = _mm512_set1_ps(shape.scale * kLog2E);
        for (long e = 0; e < group * shape.dim; e += 16) _mm512_storeu_ps(&queries[e], _mm512_mul_ps(load(q + e), scale));
        using Attend = void (*)(const std::vector<Run<S>>&, const float*, const DecodeShape&, float*, Mass*);
        constexpr Attend kAttend[kHeads] = {attend<S, 1>, attend<S, 2>, attend<S, 3>, attend<S, 4>};
        for (long g = 0; g < group; g += kHeads) {
            const long at = (number * group + g) * shape.dim;
            kAttend[std::min<long>(group - g, kHeads) - 1](runs, &queries[g * shape.dim], shape, &sums[at], mass + g);
        }
    }

    // The parts of one query head, each by its share of the whole mass.
    void merge(long seq, long head, T* out) const {
        const long first = (seq * shape.kv_heads + head / group) * splits;
        const auto mass = [&](long split) -> const Mass& { return masses[(first + split) * group + head % group]; };
        float top = -INFINITY, total = 0;
        for (long split = 0; split < splits; split++) top = std::max(top, mass(split).max);
        for (long split = 0; split < splits; split++)
            if (mass(split).sum != 0) total += mass(split).sum * std::exp2(mass(split).max - top);
        for (long e = 0; e < shape.dim; e += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (long split = 0; split < splits; split++) {
                if (mass(split).sum == 0) continue;  // nothing of it was seen
                const __m512 part = _mm512_set1_ps(std::exp2(mass(split).max - top) / total);
                sum = _mm512_fmadd_ps(part, load(&sums[((first + split) * group + head % group) * shape.dim + e]), sum);
            }
            store(out + e, sum);
        }
    }

private:
    template <class Number>
    static std::vector<Number>& scratch() {
        static thread_local std::vector<Number> kept;
        return kept;
    }

    const DecodeShape& shape;
    const KvLayer& kv;
    const long group = shape.heads / shape.kv_heads;
    const long splits = std::max(1L, (shape.max_len + kSplit - 1) / kSplit);
    std::vector<float>& sums;   // [tasks, group, dim]
    std::vector<Mass>& masses;  // [tasks, group]
};

}  // namespace shoal
