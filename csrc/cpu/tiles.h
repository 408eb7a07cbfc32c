// Products of small panels with AVX-512: what weight gradients and attention are made of.
//
// A panel holds 32-bit elements [depth, width]: floats, or pairs of bfloat16 that follow each other along the depth, as
// the dot product takes them. Sums are float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "adamw.h"
#include "targets.h"

#ifdef MEGACORE_X86
#include <immintrin.h>

#define MEGACORE_WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define MEGACORE_DOT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace megacore {

constexpr std::int64_t kRows = 6;     // of a tile of results, as many as a left panel is wide
constexpr std::int64_t kColumns = 64;  // of a tile, as many as a right panel is wide: four vectors

MEGACORE_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The packed element of one place: of bfloat16, that of this row (low) and the next one (high).
MEGACORE_INLINE std::uint32_t packed(const float* first, const float*, std::int64_t i) {
    std::uint32_t bits;
    std::memcpy(&bits, first + i, sizeof(bits));
    return bits;
}

MEGACORE_INLINE std::uint32_t packed(const BFloat16* first, const BFloat16* second, std::int64_t i) {
    const std::uint32_t low = first[i].bits;
    return second ? low | static_cast<std::uint32_t>(second[i].bits) << 16 : low;
}

// `count` columns of a row (of two of bfloat16; the second may be none), then zeros up to `width`.
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
    static constexpr std::int64_t kDepth = 1;  // numbers in a packed element
    MEGACORE_WIDE MEGACORE_INLINE static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
};

struct Dot {
    using Element = BFloat16;
    static constexpr std::int64_t kDepth = 2;
    MEGACORE_DOT MEGACORE_INLINE static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};

// Panels a [depth, kRows] and b [depth, kColumns]: their product [rows, columns] is added to `into`. Of a narrow tile
// only 32 columns are computed.
#define MEGACORE_TILE(name, target, Step, kVectors)                                                              \
    target inline void name(const std::uint32_t* a, const std::uint32_t* b, std::int64_t depth, float* into,     \
                            std::int64_t stride, std::int64_t rows, std::int64_t columns) {                      \
        __m512 sums[kRows][kVectors];                                                                            \
        for (auto& row : sums) {                                                                                 \
            for (auto& each : row) each = _mm512_setzero_ps();                                                   \
        }                                                                                                        \
        for (std::int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns) {                                    \
            __m512i right[kVectors];                                                                             \
            _Pragma("GCC unroll 4") for (int part = 0; part < kVectors; ++part) {                                \
                right[part] = _mm512_loadu_si512(b + 16 * part);                                                 \
            }                                                                                                    \
            _Pragma("GCC unroll 6") for (int row = 0; row < kRows; ++row) {                                      \
                const __m512i left = _mm512_set1_epi32(static_cast<int>(a[row]));                                \
                _Pragma("GCC unroll 4") for (int part = 0; part < kVectors; ++part) {                            \
                    sums[row][part] = Step::add(sums[row][part], left, right[part]);                             \
                }                                                                                                \
            }                                                                                                    \
        }                                                                                                        \
        _Pragma("GCC unroll 6") for (int row = 0; row < kRows; ++row) {                                          \
            if (row >= rows) break;                                                                              \
            _Pragma("GCC unroll 4") for (int part = 0; part < kVectors; ++part) {                                \
                const std::int64_t left = columns - 16 * part;                                                   \
                const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);   \
                float* to = into + row * stride + 16 * part;                                                     \
                _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[row][part])); \
            }                                                                                                    \
        }                                                                                                        \
    }

MEGACORE_TILE(tile_fma, MEGACORE_WIDE, Fma, 4)
MEGACORE_TILE(tile_fma_narrow, MEGACORE_WIDE, Fma, 2)
MEGACORE_TILE(tile_dot, MEGACORE_DOT, Dot, 4)
MEGACORE_TILE(tile_dot_narrow, MEGACORE_DOT, Dot, 2)

template <typename Step>
MEGACORE_INLINE void tile(const std::uint32_t* a, const std::uint32_t* b, std::int64_t depth, float* into,
                          std::int64_t stride, std::int64_t rows, std::int64_t columns) {
    const bool narrow = columns <= kColumns / 2;
    if constexpr (Step::kDepth == 2) {
        (narrow ? tile_dot_narrow : tile_dot)(a, b, depth, into, stride, rows, columns);
    } else {
        (narrow ? tile_fma_narrow : tile_fma)(a, b, depth, into, stride, rows, columns);
    }
}

}  // namespace megacore
#endif
