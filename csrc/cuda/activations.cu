// SwiGLU, GeGLU, and GELU of a sum with a bias. Backward computes the activation again: nothing but the input is kept.
//
// GELU is in its tanh form, as u s with s = sigmoid(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3).
#include "shares.h"

namespace megacore::gpu {
namespace {

struct Value {
    float value, slope;
};

template <Activation kActivation>
__device__ __forceinline__ Value activate(float u) {
    if (kActivation == Activation::silu) {
        const float s = fast_divide(1.0f, 1.0f + fast_exp(-u));
        return {u * s, s * (1.0f + u * (1.0f - s))};
    }
    constexpr float kScale = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    const float s = fast_divide(1.0f, 1.0f + fast_exp(-kScale * u * (1.0f + kCubic * u * u)));
    const float value = u * s;
    return {value, s + value * (1.0f - s) * kScale * (1.0f + 3.0f * kCubic * u * u)};
}

// function(row, column of a vector) over all vectors of [rows, width]: a thread keeps its column.
template <int V, typename Function>
__device__ __forceinline__ void each_vector(std::int64_t rows, std::int64_t width, const Function& function) {
    const std::int64_t column = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    const std::int64_t step = std::int64_t{gridDim.y} * blockDim.y;
    for (std::int64_t row = std::int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += step) {
        function(row, column);
    }
}

template <typename T, int V, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gated_kernel(Gated in) {
    each_vector<V>(in.rows, in.width, [&](std::int64_t row, std::int64_t column) {
        const T* from = static_cast<const T*>(in.x) + row * in.stride_x + column;
        const Vec<T, V> gate = load<V>(from), up = load<V>(from + in.width);
        Vec<T, V> out;
        MEGACORE_UNROLL
        for (int i = 0; i < V; ++i) {
            out.at[i] = T(activate<kActivation>(static_cast<float>(gate.at[i])).value * static_cast<float>(up.at[i]));
        }
        store<V>(static_cast<T*>(in.out) + row * in.width + column, out);
    });
}

template <typename T, int V, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gated_backward_kernel(Gated in) {
    each_vector<V>(in.rows, in.width, [&](std::int64_t row, std::int64_t column) {
        const T* from = static_cast<const T*>(in.x) + row * in.stride_x + column;
        const Vec<T, V> gate = load<V>(from), up = load<V>(from + in.width);
        const Vec<T, V> grad = load<V>(static_cast<const T*>(in.grad) + row * in.stride_grad + column);
        Vec<T, V> of_gate, of_up;
        MEGACORE_UNROLL
        for (int i = 0; i < V; ++i) {
            const Value a = activate<kActivation>(static_cast<float>(gate.at[i]));
            const float g = static_cast<float>(grad.at[i]);
            of_gate.at[i] = T(g * static_cast<float>(up.at[i]) * a.slope);
            of_up.at[i] = T(g * a.value);
        }
        T* to = static_cast<T*>(in.out) + row * 2 * in.width + column;
        store<V>(to, of_gate);
        store<V>(to + in.width, of_up);
    });
}

template <typename T, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads, 4) bias_gelu_kernel(BiasGelu in) {
    Vec<float, V> sums = {};
    each_vector<V>(in.rows, in.width, [&](std::int64_t row, std::int64_t column) {
        const Vec<T, V> x = load<V>(static_cast<const T*>(in.x) + row * in.stride_x + column);
        const Vec<T, V> bias = load<V>(static_cast<const T*>(in.bias) + column);
        Vec<T, V> grad, out;
        if (kBackward) grad = load<V>(static_cast<const T*>(in.grad) + row * in.stride_grad + column);
        MEGACORE_UNROLL
        for (int i = 0; i < V; ++i) {
            const Value a =
                activate<Activation::gelu>(static_cast<float>(x.at[i]) + static_cast<float>(bias.at[i]));
            const float value = kBackward ? a.slope * static_cast<float>(grad.at[i]) : a.value;
            if (kBackward) sums.at[i] += value;
            out.at[i] = T(value);
        }
        store<V>(static_cast<T*>(in.out) + row * in.width + column, out);
    });
    if (kBackward) {
        const std::int64_t column = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
        const std::int64_t share = std::int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
        if (column < in.width) {
            float* part = in.parts + share * in.width;
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) part[share_place<V>(column, i, in.width)] = sums.at[i];
        }
    }
}

struct Tiles {
    Dim grid, block;
};

// Blocks of kThreads vectors, wide as a row as far as they go; at most `most` of them below each other.
Tiles tiles_of(std::int64_t rows, std::int64_t width, Dtype dtype, bool wide, std::int64_t most) {
    const std::int64_t vectors = vectors_of(width, dtype, wide);
    const unsigned across = power_of_two(vectors, kThreads), down = kThreads / across;
    return {{static_cast<unsigned>(ceil_div(vectors, across)), blocks_for(ceil_div(rows, down), most), 1},
            {across, down, 1}};
}

constexpr std::int64_t kMostDown = 65535;

}  // namespace

void gated(const Gated& in, Dtype dtype, bool wide, Stream stream) {
    if (in.rows == 0 || in.width == 0) return;
    const Tiles tiles = tiles_of(in.rows, in.width, dtype, wide, kMostDown);
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        const auto run = [&](auto forward, auto backward) {
            launch(in.grad ? backward : forward, tiles.grid, tiles.block, 0, stream, in);
        };
        if (in.activation == Activation::silu) {
            return run(gated_kernel<T, vector(), Activation::silu>, gated_backward_kernel<T, vector(), Activation::silu>);
        }
        run(gated_kernel<T, vector(), Activation::gelu>, gated_backward_kernel<T, vector(), Activation::gelu>);
    });
}

std::int64_t bias_gelu_parts(std::int64_t rows, std::int64_t width, Dtype dtype, bool wide) {
    const Tiles tiles = tiles_of(rows, width, dtype, wide, kShares);
    return std::int64_t{tiles.grid.y} * tiles.block.y;
}

void bias_gelu(const BiasGelu& in, Dtype dtype, bool wide, Stream stream) {
    if (in.rows == 0 || in.width == 0) return;
    const Tiles tiles = tiles_of(in.rows, in.width, dtype, wide, in.grad ? kShares : kMostDown);
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        if (in.grad) return launch(bias_gelu_kernel<T, vector(), true>, tiles.grid, tiles.block, 0, stream, in);
        launch(bias_gelu_kernel<T, vector(), false>, tiles.grid, tiles.block, 0, stream, in);
    });
}

}  // namespace megacore::gpu
