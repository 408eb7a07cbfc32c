// Rotary positions, into new memory or in place. Backward is the rotation by the opposite angle.
//
// A thread turns a vector of pairs, which no other thread touches: so the result may lie where x does.
#include "device.h"

namespace megacore::gpu {
namespace {

template <typename T, int P>
struct Turned {
    Vec<T, P> first, second;
};

template <typename T, int P>
__device__ __forceinline__ Turned<T, P> turn(const Vec<T, P>& first, const Vec<T, P>& second, const Vec<T, P>& cos,
                                             const Vec<T, P>& sin, bool back) {
    Turned<T, P> out;
    MEGACORE_UNROLL
    for (int i = 0; i < P; ++i) {
        const float a = static_cast<float>(first.at[i]), b = static_cast<float>(second.at[i]);
        const float c = static_cast<float>(cos.at[i]);
        const float s = back ? -static_cast<float>(sin.at[i]) : static_cast<float>(sin.at[i]);
        out.first.at[i] = T(a * c - b * s);
        out.second.at[i] = T(b * c + a * s);
    }
    return out;
}

// P pairs at once: apart, two vectors of P elements; interleaved, one of 2 P.
template <typename T, int P, bool kApart>
__device__ __forceinline__ void turn_pairs(const Rope& in, const T* x, T* out, const T* cos, const T* sin,
                                           std::int64_t pair) {
    const Vec<T, P> c = load<P>(cos + pair), s = load<P>(sin + pair);
    if (kApart) {
        const Turned<T, P> turned = turn(load<P>(x + pair), load<P>(x + in.pairs + pair), c, s, in.back);
        store<P>(out + pair, turned.first);
        store<P>(out + in.pairs + pair, turned.second);
        return;
    }
    // Without whole vectors even two elements need not lie at a multiple of their size.
    constexpr int kTogether = P == 1 ? 1 : 2 * P;
    Vec<T, P> first, second;
    Vec<T, kTogether> both;
    if (P == 1) {
        first.at[0] = x[2 * pair];
        second.at[0] = x[2 * pair + 1];
    } else {
        both = load<kTogether>(x + 2 * pair);
        MEGACORE_UNROLL
        for (int i = 0; i < P; ++i) {
            first.at[i] = both.at[2 * i % kTogether];
            second.at[i] = both.at[(2 * i + 1) % kTogether];
        }
    }
    const Turned<T, P> turned = turn(first, second, c, s, in.back);
    if (P == 1) {
        out[2 * pair] = turned.first.at[0];
        out[2 * pair + 1] = turned.second.at[0];
    } else {
        MEGACORE_UNROLL
        for (int i = 0; i < P; ++i) {
            both.at[2 * i % kTogether] = turned.first.at[i];
            both.at[(2 * i + 1) % kTogether] = turned.second.at[i];
        }
        store<kTogether>(out + 2 * pair, both);
    }
}

// blockDim.x threads for a head of a token; V elements of it are 16 bytes, or one.
template <typename T, int V, bool kApart>
__global__ void __launch_bounds__(kThreads) rope_kernel(Rope in) {
    constexpr int P = kApart || V == 1 ? V : V / 2;
    const std::uint32_t heads = static_cast<std::uint32_t>(in.heads), seq = static_cast<std::uint32_t>(in.seq);
    const std::int64_t rows = in.batch * in.seq * in.heads, step = std::int64_t{gridDim.x} * blockDim.y;
    for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows; row += step) {
        const std::uint32_t token = static_cast<std::uint32_t>(row) / heads;
        const std::int64_t n = static_cast<std::uint32_t>(row) % heads, s = token % seq, b = token / seq;
        const T* x = static_cast<const T*>(in.x) + b * in.x_b + s * in.x_s + n * in.x_n;
        T* out = static_cast<T*>(in.out) + b * in.out_b + s * in.out_s + n * in.out_n;
        const std::int64_t angle = b * in.angle_b + s * in.pairs;
        const T* cos = static_cast<const T*>(in.cos) + angle;
        const T* sin = static_cast<const T*>(in.sin) + angle;
        for (std::int64_t pair = std::int64_t{threadIdx.x} * P; pair < in.pairs; pair += std::int64_t{blockDim.x} * P) {
            turn_pairs<T, P, kApart>(in, x, out, cos, sin, pair);
        }
        if (in.out == in.x) continue;
        const std::int64_t begin = 2 * in.pairs + std::int64_t{threadIdx.x} * V;
        for (std::int64_t place = begin; place < in.size; place += std::int64_t{blockDim.x} * V) {
            store<V>(out + place, load<V>(x + place));
        }
    }
}

}  // namespace

void rope(const Rope& in, Dtype dtype, bool wide, Stream stream) {
    const std::int64_t rows = in.batch * in.seq * in.heads;
    if (rows == 0 || in.size == 0) return;
    const std::int64_t vectors = vectors_of(in.size, dtype, wide);
    const unsigned across = power_of_two(ceil_div(vectors, 2), kWarp);
    const Dim block = {across, kThreads / across, 1};
    const Dim grid = {blocks_for(ceil_div(rows, block.y), kMostBlocks), 1, 1};
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        if (in.apart) return launch(rope_kernel<T, vector(), true>, grid, block, 0, stream, in);
        launch(rope_kernel<T, vector(), false>, grid, block, 0, stream, in);
    });
}

}  // namespace megacore::gpu
