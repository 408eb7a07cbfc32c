// All products are those of tiles.h, of blocks of queries and keys. Probabilities and their gradients take the operands'
// format on the way from one product to the next; everything else is float32.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tiles.h"

namespace megacore {

#ifdef MEGACORE_X86
namespace {

constexpr std::int64_t kQueries = 48;  // of a block: eight tiles
constexpr std::int64_t kTiles = kQueries / kRows;
constexpr std::int64_t kKeys = kColumns;
using Words = std::vector<std::uint32_t>;

MEGACORE_INLINE std::int64_t blocks_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// A panel of rows whose depth lies together: to [depth, width]. Behind `count` rows there are zeros.
template <typename Step>
MEGACORE_INLINE void pack_turned(const typename Step::Element* rows, std::int64_t stride, std::int64_t count,
                                 std::int64_t depth, std::int64_t width, std::uint32_t* __restrict__ to) {
    for (std::int64_t r = 0; r < width; ++r) {
        if (r < count) {
            const auto* row = rows + r * stride;
            for (std::int64_t k = 0; k < depth; ++k) std::memcpy(&to[k * width + r], row + k * Step::kDepth, 4);
        } else {
            for (std::int64_t k = 0; k < depth; ++k) to[k * width + r] = 0;
        }
    }
}

// A panel of rows that are the depth: `columns` of each.
template <typename Step>
MEGACORE_INLINE void pack_deep(const typename Step::Element* rows, std::int64_t stride, std::int64_t count,
                               std::int64_t depth, std::int64_t columns, std::int64_t width, std::uint32_t* to) {
    for (std::int64_t k = 0; k < depth; ++k, to += width) {
        const auto* first = rows + k * Step::kDepth * stride;
        const std::int64_t left = count - k * Step::kDepth;
        pack_row(first, Step::kDepth == 2 && left > 1 ? first + stride : nullptr, left > 0 ? columns : 0, width, to);
    }
}

// Everything of one head that products read, packed once.
template <typename Step>
struct Packed {
    using T = typename Step::Element;
    std::int64_t words, panels, size, blocks, block;
    Words turned, deep;

    // Rows [length, dims] in blocks of `block` rows, in panels `width` wide where they are turned.
    MEGACORE_INLINE Packed(const T* rows, std::int64_t stride, std::int64_t length, std::int64_t dims,
                           std::int64_t of_block, std::int64_t width, bool wants_turned, bool wants_deep)
        : words(dims / Step::kDepth), panels(blocks_of(dims, kColumns)), size(of_block / Step::kDepth * kColumns),
          blocks(blocks_of(length, of_block)), block(of_block) {
        if (wants_turned) turned.resize(static_cast<std::size_t>(blocks * block * words));
        if (wants_deep) deep.resize(static_cast<std::size_t>(blocks * panels * size));
        for (std::int64_t each = 0; each < blocks; ++each) {
            const std::int64_t start = each * block, count = least(block, length - start);
            const T* first = rows + start * stride;
            for (std::int64_t r = 0; wants_turned && r < block; r += width) {
                pack_turned<Step>(first + r * stride, stride, count - r, words, width,
                                  &turned[static_cast<std::size_t>((start + r) * words)]);
            }
            for (std::int64_t panel = 0; wants_deep && panel < panels; ++panel) {
                pack_deep<Step>(first + panel * kColumns, stride, count, block / Step::kDepth,
                                least(kColumns, dims - panel * kColumns), kColumns, of(each, panel));
            }
        }
    }

    MEGACORE_INLINE std::uint32_t* of(std::int64_t each, std::int64_t panel) {
        return &deep[static_cast<std::size_t>((each * panels + panel) * size)];
    }
    MEGACORE_INLINE const std::uint32_t* row(std::int64_t start) const {
        return &turned[static_cast<std::size_t>(start * words)];
    }
};

// Of the keys of a block from `key` on, those that a query sees.
MEGACORE_INLINE std::int64_t seen(std::int64_t query, std::int64_t key) {
    return std::max<std::int64_t>(0, least(kKeys, query - key + 1));
}

template <typename Step>
MEGACORE_INLINE void scores_of(const std::uint32_t* left, const std::uint32_t* right, std::int64_t words, float* to) {
    for (std::int64_t i = 0; i < kQueries * kKeys; ++i) to[i] = 0;
    for (std::int64_t t = 0; t < kTiles; ++t) {
        tile<Step>(left + t * kRows * words, right, words, to + t * kRows * kKeys, kKeys, kRows, kKeys);
    }
}

// rows [kQueries, kKeys] times the keys' panels, added to `into`.
template <typename Step>
MEGACORE_INLINE void add_by_query(const typename Step::Element* rows, Packed<Step>& keys, std::int64_t block,
                                  std::int64_t dims, float* into, std::int64_t stride) {
    constexpr std::int64_t depth = kKeys / Step::kDepth;
    std::uint32_t left[depth * kRows];
    for (std::int64_t t = 0; t < kTiles; ++t) {
        pack_turned<Step>(rows + t * kRows * kKeys, kKeys, kRows, depth, kRows, left);
        for (std::int64_t p = 0; p < keys.panels; ++p) {
            tile<Step>(left, keys.of(block, p), depth, into + t * kRows * stride + p * kColumns, stride, kRows,
                       least(kColumns, dims - p * kColumns));
        }
    }
}

// The transposed rows [kQueries, kKeys] times the queries' panels, added to `into`.
template <typename Step>
MEGACORE_INLINE void add_by_key(const typename Step::Element* rows, Packed<Step>& queries, std::int64_t block,
                                std::int64_t dims, float* into, std::int64_t stride) {
    constexpr std::int64_t depth = kQueries / Step::kDepth;
    std::uint32_t left[depth * kRows];
    for (std::int64_t key = 0; key < kKeys; key += kRows) {
        const std::int64_t count = least(kRows, kKeys - key);
        pack_deep<Step>(rows + key, kKeys, kQueries, depth, count, kRows, left);
        for (std::int64_t p = 0; p < queries.panels; ++p) {
            tile<Step>(left, queries.of(block, p), depth, into + key * stride + p * kColumns, stride, count,
                       least(kColumns, dims - p * kColumns));
        }
    }
}

template <typename Step>
MEGACORE_INLINE void attend_heads(const Attention<typename Step::Element>& in, std::int64_t begin, std::int64_t end) {
    using T = typename Step::Element;
    const std::int64_t length = in.length, dims = in.dims, stride = blocks_of(dims, kColumns) * kColumns;
    const float scale = in.scale;
    std::vector<float> sum(static_cast<std::size_t>(kQueries * stride));
    float scores[kQueries * kKeys];
    T weights[kQueries * kKeys];
    for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t b = task / in.heads, h = task % in.heads, m = h / in.groups;
        const Packed<Step> queries(in.q.at(b, h), in.q.token, length, dims, kQueries, kRows, true, false);
        const Packed<Step> keys(in.k.at(b, m), in.k.token, length, dims, kKeys, kColumns, true, false);
        Packed<Step> values(in.v.at(b, m), in.v.token, length, dims, kKeys, kColumns, false, true);
        for (std::int64_t query = 0; query < length; query += kQueries) {
            const std::int64_t count = least(kQueries, length - query);
            float largest[kQueries], total[kQueries];
            for (std::int64_t r = 0; r < kQueries; ++r) largest[r] = -HUGE_VALF, total[r] = 0;
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (std::int64_t key = 0; key < query + count; key += kKeys) {
                scores_of<Step>(queries.row(query), keys.row(key), keys.words, scores);
                for (std::int64_t r = 0; r < kQueries; ++r) {
                    const std::int64_t visible = r < count ? seen(query + r, key) : 0;
                    float* row = scores + r * kKeys;
                    T* to = weights + r * kKeys;
                    float tops[16], top = -HUGE_VALF;
                    for (float& each : tops) each = top;
                    for (std::int64_t j = 0; j < kKeys; ++j) row[j] = j < visible ? row[j] : -HUGE_VALF;
                    for (std::int64_t j = 0; j < kKeys; ++j) tops[j % 16] = row[j] > tops[j % 16] ? row[j] : tops[j % 16];
                    for (const float each : tops) top = each > top ? each : top;
                    const float before = largest[r], now = std::max(before, top * scale);
                    for (std::int64_t j = 0; j < kKeys; ++j) row[j] = j < visible ? exp_of(row[j] * scale - now) : 0.0f;
                    float lanes[16] = {};
                    for (std::int64_t j = 0; j < kKeys; ++j) lanes[j % 16] += row[j];
                    float added = 0;
                    for (const float each : lanes) added += each;
                    for (std::int64_t j = 0; j < kKeys; ++j) store(row[j], to[j]);
                    if (!visible) continue;
                    const float shrink = key ? std::exp(before - now) : 0.0f;
                    if (shrink != 1.0f) {
                        for (std::int64_t c = 0; c < stride; ++c) sum[static_cast<std::size_t>(r * stride + c)] *= shrink;
                    }
                    total[r] = total[r] * shrink + added;
                    largest[r] = now;
                }
                add_by_query<Step>(weights, values, key / kKeys, dims, sum.data(), stride);
            }
            for (std::int64_t r = 0; r < count; ++r) {
                T* y = in.y.at(b, h) + (query + r) * in.y.token;
                const float* from = &sum[static_cast<std::size_t>(r * stride)];
                for (std::int64_t c = 0; c < dims; ++c) store(from[c] / total[r], y[c]);
                in.sums[task * length + query + r] = largest[r] + std::log(total[r]);
            }
        }
    }
}

template <typename T>
MEGACORE_INLINE void write_rows(const std::vector<float>& from, std::int64_t stride, T* to, std::int64_t token,
                                std::int64_t length, std::int64_t dims) {
    for (std::int64_t t = 0; t < length; ++t) {
        for (std::int64_t c = 0; c < dims; ++c) store(from[static_cast<std::size_t>(t * stride + c)], to[t * token + c]);
    }
}

template <typename Step>
MEGACORE_INLINE void attend_heads_backward(const Attention<typename Step::Element>& in, std::int64_t begin,
                                           std::int64_t end) {
    using T = typename Step::Element;
    const std::int64_t length = in.length, dims = in.dims, stride = blocks_of(dims, kColumns) * kColumns;
    const std::int64_t num_keys = in.heads / in.groups;
    const float scale = in.scale;
    std::vector<float> of_q(static_cast<std::size_t>(blocks_of(length, kQueries) * kQueries * stride));
    std::vector<float> delta(static_cast<std::size_t>(length));
    std::vector<float> of_k(static_cast<std::size_t>(blocks_of(length, kKeys) * kKeys * stride)), of_v(of_k.size());
    float scores[kQueries * kKeys], pulls[kQueries * kKeys];
    T weights[kQueries * kKeys], slopes[kQueries * kKeys];
    for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t b = task / num_keys, m = task % num_keys;
        Packed<Step> keys(in.k.at(b, m), in.k.token, length, dims, kKeys, kColumns, true, true);
        const Packed<Step> values(in.v.at(b, m), in.v.token, length, dims, kKeys, kColumns, true, false);
        std::fill(of_k.begin(), of_k.end(), 0.0f);
        std::fill(of_v.begin(), of_v.end(), 0.0f);
        for (std::int64_t h = m * in.groups; h < (m + 1) * in.groups; ++h) {
            Packed<Step> queries(in.q.at(b, h), in.q.token, length, dims, kQueries, kRows, true, true);
            Packed<Step> grads(in.grad.at(b, h), in.grad.token, length, dims, kQueries, kRows, true, true);
            std::fill(of_q.begin(), of_q.end(), 0.0f);
            for (std::int64_t t = 0; t < length; ++t) {
                const T *y = in.y.at(b, h) + t * in.y.token, *grad = in.grad.at(b, h) + t * in.grad.token;
                float parts[16] = {}, product = 0;
                for (std::int64_t c = 0; c < dims; ++c) parts[c % 16] += load(y[c]) * load(grad[c]);
                for (const float each : parts) product += each;
                delta[static_cast<std::size_t>(t)] = product;
            }
            const float* sums = in.sums + (b * in.heads + h) * length;
            for (std::int64_t key = 0; key < length; key += kKeys) {
                for (std::int64_t query = key / kQueries * kQueries; query < length; query += kQueries) {
                    scores_of<Step>(queries.row(query), keys.row(key), keys.words, scores);
                    scores_of<Step>(grads.row(query), values.row(key), keys.words, pulls);
                    for (std::int64_t r = 0; r < kQueries; ++r) {
                        const std::int64_t visible = query + r < length ? seen(query + r, key) : 0;
                        const float own = visible ? sums[query + r] : 0;
                        const float mean = visible ? delta[static_cast<std::size_t>(query + r)] : 0;
                        float *row = scores + r * kKeys, *pull = pulls + r * kKeys;
                        for (std::int64_t j = 0; j < kKeys; ++j) {
                            row[j] = j < visible ? exp_of(row[j] * scale - own) : 0.0f;
                        }
                        for (std::int64_t j = 0; j < kKeys; ++j) pull[j] = row[j] * (pull[j] - mean) * scale;
                        for (std::int64_t j = 0; j < kKeys; ++j) store(row[j], weights[r * kKeys + j]);
                        for (std::int64_t j = 0; j < kKeys; ++j) store(pull[j], slopes[r * kKeys + j]);
                    }
                    const std::int64_t block = query / kQueries;
                    add_by_key<Step>(weights, grads, block, dims, of_v.data() + key * stride, stride);
                    add_by_key<Step>(slopes, queries, block, dims, of_k.data() + key * stride, stride);
                    add_by_query<Step>(slopes, keys, key / kKeys, dims, of_q.data() + query * stride, stride);
                }
            }
            write_rows(of_q, stride, in.grad_q.at(b, h), in.grad_q.token, length, dims);
        }
        write_rows(of_k, stride, in.grad_k.at(b, m), in.grad_k.token, length, dims);
        write_rows(of_v, stride, in.grad_v.at(b, m), in.grad_v.token, length, dims);
    }
}

}  // namespace

template <>
MEGACORE_AVX512 void attend(const Attention<float>& in, std::int64_t begin, std::int64_t end) {
    attend_heads<Fma>(in, begin, end);
}

template <>
MEGACORE_AVX512 void attend(const Attention<BFloat16>& in, std::int64_t begin, std::int64_t end) {
    attend_heads<Dot>(in, begin, end);
}

template <>
MEGACORE_AVX512 void attend_backward(const Attention<float>& in, std::int64_t begin, std::int64_t end) {
    attend_heads_backward<Fma>(in, begin, end);
}

template <>
MEGACORE_AVX512 void attend_backward(const Attention<BFloat16>& in, std::int64_t begin, std::int64_t end) {
    attend_heads_backward<Dot>(in, begin, end);
}

#else

template <>
void attend(const Attention<float>&, std::int64_t, std::int64_t) {}
template <>
void attend(const Attention<BFloat16>&, std::int64_t, std::int64_t) {}
template <>
void attend_backward(const Attention<float>&, std::int64_t, std::int64_t) {}
template <>
void attend_backward(const Attention<BFloat16>&, std::int64_t, std::int64_t) {}

#endif

}  // namespace megacore
