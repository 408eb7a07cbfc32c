// A product that sums over tokens, the slow dim of both operands. They are packed into panels on the way: of x,
// kWidth inputs of all tokens of a slab; of the gradient, kTile outputs. Two bfloat16 tokens make one 32-bit element,
// which is what the dot product of AVX-512 takes; its sums are float32.
#include "wgrad.h"

#include <cstring>
#include <memory>

#include "targets.h"

#ifdef MEGACORE_X86
#include <immintrin.h>
#endif

namespace megacore {

#ifdef MEGACORE_X86
#define MEGACORE_WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define MEGACORE_DOT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace {

constexpr std::int64_t kWidth = 64;   // inputs of a panel: four vectors
constexpr std::int64_t kDepth = 256;  // packed elements of a slab: 512 tokens of bfloat16, 256 of float32
constexpr std::int64_t kTiles = 40;   // tiles whose panels stay in cache: 240 KiB

// The packed element of one place: of bfloat16, that of this token (low) and the next one (high, 0 behind the last).
MEGACORE_INLINE std::uint32_t packed(const float* first, const float*, std::int64_t i) {
    std::uint32_t bits;
    std::memcpy(&bits, first + i, sizeof(bits));
    return bits;
}

MEGACORE_INLINE std::uint32_t packed(const BFloat16* first, const BFloat16* second, std::int64_t i) {
    const std::uint32_t low = first[i].bits;
    return second ? low | static_cast<std::uint32_t>(second[i].bits) << 16 : low;
}

// `count` columns of a row (two of bfloat16), then zeros up to `width`.
template <typename T>
MEGACORE_INLINE void pack_row(const T* first, const T* second, std::int64_t count, std::int64_t width,
                              std::uint32_t* __restrict__ to) {
    if (second) {
        for (std::int64_t i = 0; i < count; ++i) to[i] = packed(first, second, i);
    } else {
        for (std::int64_t i = 0; i < count; ++i) to[i] = packed(first, static_cast<const T*>(nullptr), i);
    }
    for (std::int64_t i = count; i < width; ++i) to[i] = 0;
}

struct Fma {
    using Element = float;
    static constexpr std::int64_t kTokens = 1;
    MEGACORE_WIDE MEGACORE_INLINE static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
};

struct Dot {
    using Element = BFloat16;
    static constexpr std::int64_t kTokens = 2;
    MEGACORE_DOT MEGACORE_INLINE static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};

// sums [kTile, kWidth] of panels a [depth, kTile] and b [depth, kWidth], added to rows of `into`.
#define MEGACORE_TILE(name, target, Step)                                                                       \
    target static void name(const std::uint32_t* a, const std::uint32_t* b, std::int64_t depth, float* into,    \
                            std::int64_t stride, std::int64_t rows, std::int64_t columns) {                     \
        __m512 sums[kTile][4];                                                                                  \
        for (auto& row : sums) {                                                                                \
            for (auto& each : row) each = _mm512_setzero_ps();                                                  \
        }                                                                                                       \
        for (std::int64_t k = 0; k < depth; ++k, a += kTile, b += kWidth) {                                     \
            const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 16);                          \
            const __m512i b2 = _mm512_loadu_si512(b + 32), b3 = _mm512_loadu_si512(b + 48);                     \
            _Pragma("GCC unroll 6") for (int row = 0; row < kTile; ++row) {                                     \
                const __m512i own = _mm512_set1_epi32(static_cast<int>(a[row]));                                \
                sums[row][0] = Step::add(sums[row][0], own, b0);                                                \
                sums[row][1] = Step::add(sums[row][1], own, b1);                                                \
                sums[row][2] = Step::add(sums[row][2], own, b2);                                                \
                sums[row][3] = Step::add(sums[row][3], own, b3);                                                \
            }                                                                                                   \
        }                                                                                                       \
        _Pragma("GCC unroll 6") for (int row = 0; row < kTile; ++row) {                                         \
            if (row >= rows) break;                                                                             \
            _Pragma("GCC unroll 4") for (int part = 0; part < 4; ++part) {                                      \
                const std::int64_t left = columns - 16 * part;                                                  \
                const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);     \
                float* to = into + row * stride + 16 * part;                                                    \
                _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[row][part])); \
            }                                                                                                   \
        }                                                                                                       \
    }

MEGACORE_TILE(tile_fma, MEGACORE_WIDE, Fma)
MEGACORE_TILE(tile_dot, MEGACORE_DOT, Dot)

template <typename Step>
MEGACORE_INLINE void tile(const std::uint32_t* a, const std::uint32_t* b, std::int64_t depth, float* into,
                          std::int64_t stride, std::int64_t rows, std::int64_t columns) {
    if constexpr (Step::kTokens == 2) {
        tile_dot(a, b, depth, into, stride, rows, columns);
    } else {
        tile_fma(a, b, depth, into, stride, rows, columns);
    }
}

MEGACORE_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <typename Step>
MEGACORE_INLINE void add_tiles(const WeightGradient<typename Step::Element>& in, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t tokens = Step::kTokens;
    const std::unique_ptr<std::uint32_t[]> grads(new std::uint32_t[kTiles * kTile * kDepth]);
    const std::unique_ptr<std::uint32_t[]> inputs(new std::uint32_t[kWidth * kDepth]);
    std::uint32_t row[kTiles * kTile];
    for (std::int64_t first = begin; first < end; first += kTiles) {
        const std::int64_t tiles = least(kTiles, end - first), output = first * kTile;
        const std::int64_t outputs = least(tiles * kTile, in.outputs - output);
        for (std::int64_t t = 0; t < in.tokens; t += kDepth * tokens) {
            const std::int64_t depth = least(kDepth, (in.tokens - t + tokens - 1) / tokens);
            for (std::int64_t k = 0; k < depth; ++k) {
                const std::int64_t token = t + k * tokens;
                const auto* grad = in.grad + token * in.outputs + output;
                const bool pair = tokens == 2 && token + 1 < in.tokens;
                pack_row(grad, pair ? grad + in.outputs : nullptr, outputs, tiles * kTile, row);
                for (std::int64_t each = 0; each < tiles; ++each) {
                    std::memcpy(&grads[(each * kDepth + k) * kTile], row + each * kTile, kTile * sizeof(*row));
                }
            }
            for (std::int64_t i = 0; i < in.inputs; i += kWidth) {
                const std::int64_t columns = least(kWidth, in.inputs - i);
                for (std::int64_t k = 0; k < depth; ++k) {
                    const std::int64_t token = t + k * tokens;
                    const auto* x = in.x + token * in.inputs + i;
                    const bool pair = tokens == 2 && token + 1 < in.tokens;
                    pack_row(x, pair ? x + in.inputs : nullptr, columns, kWidth, &inputs[k * kWidth]);
                }
                for (std::int64_t each = 0; each < tiles; ++each) {
                    tile<Step>(&grads[each * kDepth * kTile], inputs.get(), depth,
                               in.into + (output + each * kTile) * in.inputs + i, in.inputs,
                               least(kTile, in.outputs - output - each * kTile), columns);
                }
            }
        }
    }
}

}  // namespace

bool wgrad_supported(bool narrow) {
    return supported(Isa::avx512) && (!narrow || __builtin_cpu_supports("avx512bf16"));
}

template <>
MEGACORE_AVX512 void wgrad(const WeightGradient<float>& in, std::int64_t begin, std::int64_t end) {
    add_tiles<Fma>(in, begin, end);
}

template <>
MEGACORE_AVX512 void wgrad(const WeightGradient<BFloat16>& in, std::int64_t begin, std::int64_t end) {
    add_tiles<Dot>(in, begin, end);
}

#else

bool wgrad_supported(bool) { return false; }

template <>
void wgrad(const WeightGradient<float>&, std::int64_t, std::int64_t) {}

template <>
void wgrad(const WeightGradient<BFloat16>&, std::int64_t, std::int64_t) {}

#endif

}  // namespace megacore
