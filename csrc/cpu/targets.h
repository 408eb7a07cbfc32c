// How a plain loop is compiled once for every instruction set: inlined into a function for it.
#pragma once

#include <cstring>

#include "adamw.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MEGACORE_X86 1
#define MEGACORE_AVX2 __attribute__((target("avx2")))
#if defined(__clang__)
#define MEGACORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define MEGACORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#endif

// Inlined into a function for an instruction set, a loop is compiled for that set.
#define MEGACORE_INLINE inline __attribute__((always_inline))

namespace megacore {

MEGACORE_INLINE float load(float value) { return value; }

MEGACORE_INLINE float load(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

MEGACORE_INLINE void store(float value, float& to) { to = value; }

// To the nearest, ties to even; what is not a number stays one.
MEGACORE_INLINE void store(float value, BFloat16& to) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace megacore
