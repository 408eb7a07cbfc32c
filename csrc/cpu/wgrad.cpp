// A product that sums over tokens, the slow dim of both operands. They are packed into panels on the way: of x,
// kColumns inputs of all tokens of a slab; of the gradient, kTile outputs. Two bfloat16 tokens make one 32-bit element,
// which is what the dot product of AVX-512 takes; its sums are float32.
#include "wgrad.h"

#include <cstring>
#include <memory>

#include "tiles.h"

namespace megacore {

#ifdef MEGACORE_X86

namespace {

static_assert(kTile == kRows);
constexpr std::int64_t kSlab = 256;   // packed elements along the tokens: 512 of bfloat16, 256 of float32
constexpr std::int64_t kTiles = 40;   // tiles whose panels stay in cache: 240 KiB

template <typename Step>
MEGACORE_INLINE void add_tiles(const WeightGradient<typename Step::Element>& in, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t tokens = Step::kDepth;
    const std::unique_ptr<std::uint32_t[]> grads(new std::uint32_t[kTiles * kRows * kSlab]);
    const std::unique_ptr<std::uint32_t[]> inputs(new std::uint32_t[kColumns * kSlab]);
    std::uint32_t row[kTiles * kRows];
    for (std::int64_t first = begin; first < end; first += kTiles) {
        const std::int64_t tiles = least(kTiles, end - first), output = first * kRows;
        const std::int64_t outputs = least(tiles * kRows, in.outputs - output);
        for (std::int64_t t = 0; t < in.tokens; t += kSlab * tokens) {
            const std::int64_t depth = least(kSlab, (in.tokens - t + tokens - 1) / tokens);
            for (std::int64_t k = 0; k < depth; ++k) {
                const std::int64_t token = t + k * tokens;
                const auto* grad = in.grad + token * in.outputs + output;
                const bool pair = tokens == 2 && token + 1 < in.tokens;
                pack_row(grad, pair ? grad + in.outputs : nullptr, outputs, tiles * kRows, row);
                for (std::int64_t each = 0; each < tiles; ++each) {
                    std::memcpy(&grads[(each * kSlab + k) * kRows], row + each * kRows, kRows * sizeof(*row));
                }
            }
            for (std::int64_t i = 0; i < in.inputs; i += kColumns) {
                const std::int64_t columns = least(kColumns, in.inputs - i);
                for (std::int64_t k = 0; k < depth; ++k) {
                    const std::int64_t token = t + k * tokens;
                    const auto* x = in.x + token * in.inputs + i;
                    const bool pair = tokens == 2 && token + 1 < in.tokens;
                    pack_row(x, pair ? x + in.inputs : nullptr, columns, kColumns, &inputs[k * kColumns]);
                }
                for (std::int64_t each = 0; each < tiles; ++each) {
                    tile<Step>(&grads[each * kSlab * kRows], inputs.get(), depth,
                               in.into + (output + each * kRows) * in.inputs + i, in.inputs,
                               least(kRows, in.outputs - output - each * kRows), columns);
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
