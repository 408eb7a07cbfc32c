// RMSNorm, alone or with the sum before it, and LayerNorm.
//
// With r = 1 / rms, n = x r the normalised row, w the factor and g the gradient of y = n w:
//     RMSNorm    dx = r (g w - n mean(g w n))                    dw = sum over rows of g n
//     LayerNorm  dx = r (g w - mean(g w) - n mean(g w n))        dw as before, db = sum over rows of g
//
// Each block adds up its rows' share of dw and db in shared memory, or where that is too small in global memory; each
// number belongs to one thread. column_sums adds the shares: no atomics, so the same bits in every run.
#include "shares.h"

namespace megacore::gpu {
namespace {

template <typename T, int V, bool kCentred>
__global__ void __launch_bounds__(kThreads) norm_kernel(Norm in) {
    const T* weight = static_cast<const T*>(in.weight);
    const T* bias = static_cast<const T*>(in.bias);
    const float width = static_cast<float>(in.width);
    const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
    for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < in.rows; row += step) {
        Held<T, V> x(static_cast<const T*>(in.x) + row * in.stride_x, in.width);
        if (in.residual) {
            const T* residual = static_cast<const T*>(in.residual) + row * in.stride_residual;
            T* total = static_cast<T*>(in.total) + row * in.width;
            x.each([&](Vec<T, V>& values, std::int64_t column) {
                const Vec<T, V> added = load<V>(residual + column);
                MEGACORE_UNROLL
                for (int i = 0; i < V; ++i) {
                    values.at[i] = T(static_cast<float>(values.at[i]) + static_cast<float>(added.at[i]));
                }
                store<V>(total + column, values);
            });
            x.row = total;  // what no register holds is read from there, by the thread that wrote it
        }
        float centre = 0;
        if (kCentred) {
            x.each([&](const Vec<T, V>& values, std::int64_t) {
                MEGACORE_UNROLL
                for (int i = 0; i < V; ++i) centre += static_cast<float>(values.at[i]);
            });
            centre = over_row<Sum>(centre, 0.0f) / width;
        }
        float squares = 0;
        x.each([&](const Vec<T, V>& values, std::int64_t) {
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float value = static_cast<float>(values.at[i]) - centre;
                squares += value * value;
            }
        });
        const float inverse = inverse_root(over_row<Sum>(squares, 0.0f) / width + in.eps);
        if (threadIdx.x == 0) {
            in.inverse[row] = inverse;
            if (kCentred) in.mean[row] = centre;
        }
        T* y = static_cast<T*>(in.y) + row * in.width;
        x.each([&](const Vec<T, V>& values, std::int64_t column) {
            const Vec<T, V> factor = load<V>(weight + column);
            Vec<T, V> shift, out;
            if (kCentred) shift = load<V>(bias + column);
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) {
                float value = (static_cast<float>(values.at[i]) - centre) * inverse;
                value *= static_cast<float>(factor.at[i]) + in.offset;
                if (kCentred) value += static_cast<float>(shift.at[i]);
                out.at[i] = T(value);
            }
            store<V>(y + column, out);
        });
    }
}

template <typename T, int V, bool kCentred>
__global__ void __launch_bounds__(kThreads, 2) norm_backward_kernel(NormBackward in, bool shared) {
    MEGACORE_DYNAMIC_SHARED(memory);
    constexpr int kKinds = kCentred ? 2 : 1;
    const T* weight = static_cast<const T*>(in.weight);
    const std::int64_t width = in.width, size = kKinds * width;
    const std::int64_t share = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    float* part = in.parts + share * size;
    float* sums = shared ? memory + threadIdx.y * size : part;
    const auto each_column = [&](const auto& function) {
        for (std::int64_t column = std::int64_t{threadIdx.x} * V; column < width;
             column += std::int64_t{blockDim.x} * V) {
            for (int i = 0; i < V; ++i) {
                for (int kind = 0; kind < kKinds; ++kind) function(kind * width + share_place<V>(column, i, width));
            }
        }
    };
    each_column([&](std::int64_t place) { sums[place] = 0; });
    for (std::int64_t row = share; row < in.rows; row += std::int64_t{gridDim.x} * blockDim.y) {
        Held<T, V> grads(static_cast<const T*>(in.grad) + row * in.stride_grad, width);
        Held<T, V> inputs(static_cast<const T*>(in.x) + row * in.stride_x, width);
        const float inverse = in.inverse[row], centre = kCentred ? in.mean[row] : 0.0f;
        float product = 0, plain = 0;
        const auto both = [&](const auto& function) {  // function(gradients, inputs, column) of all vectors
            MEGACORE_UNROLL
            for (int k = 0; k < kHeld; ++k) {
                const std::int64_t column = inputs.place(k);
                if (column < width) function(grads.own[k], inputs.own[k], column);
            }
            for (std::int64_t column = inputs.place(kHeld); column < width; column += std::int64_t{blockDim.x} * V) {
                function(load<V>(grads.row + column), load<V>(inputs.row + column), column);
            }
        };
        both([&](const Vec<T, V>& g, const Vec<T, V>& x, std::int64_t column) {
            const Vec<T, V> factor = load<V>(weight + column);
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float grad = static_cast<float>(g.at[i]);
                const float normal = (static_cast<float>(x.at[i]) - centre) * inverse;
                const float scaled = grad * (static_cast<float>(factor.at[i]) + in.offset);
                const std::int64_t place = share_place<V>(column, i, width);
                sums[place] += grad * normal;
                product += scaled * normal;
                if (kCentred) {
                    sums[width + place] += grad;
                    plain += scaled;
                }
            }
        });
        product = over_row<Sum>(product, 0.0f) / static_cast<float>(width);
        if (kCentred) plain = over_row<Sum>(plain, 0.0f) / static_cast<float>(width);
        const T* total = in.grad_total ? static_cast<const T*>(in.grad_total) + row * in.stride_total : nullptr;
        T* grad_x = static_cast<T*>(in.grad_x) + row * width;
        both([&](const Vec<T, V>& g, const Vec<T, V>& x, std::int64_t column) {
            const Vec<T, V> factor = load<V>(weight + column);
            Vec<T, V> more, out;
            if (total) more = load<V>(total + column);
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float normal = (static_cast<float>(x.at[i]) - centre) * inverse;
                const float scaled = static_cast<float>(g.at[i]) * (static_cast<float>(factor.at[i]) + in.offset);
                float value = (scaled - plain - normal * product) * inverse;
                if (total) value += static_cast<float>(more.at[i]);
                out.at[i] = T(value);
            }
            store<V>(grad_x + column, out);
        });
    }
    if (shared) each_column([&](std::int64_t place) { part[place] = sums[place]; });
}

// A block adds 32 places, 32 rows of parts at a time.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarp)
    column_sums_kernel(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t width, int vector, T* out) {
    __shared__ float tile[kWarp][kWarp + 1];
    const std::int64_t place = std::int64_t{blockIdx.x} * kWarp + threadIdx.x;
    float sum = 0;
    if (place < width) {
        for (std::int64_t row = threadIdx.y; row < count; row += kWarp) sum += parts[row * stride + place];
    }
    tile[threadIdx.y][threadIdx.x] = sum;
    sync_block();
    if (threadIdx.y == 0 && place < width) {
        sum = 0;
        for (unsigned i = 0; i < kWarp; ++i) sum += tile[i][threadIdx.x];
        const std::int64_t vectors = width / vector;
        out[place % vectors * vector + place / vectors] = T(sum);
    }
}

}  // namespace

void norm(const Norm& in, Dtype dtype, bool wide, Stream stream) {
    if (in.rows == 0 || in.width == 0) return;
    const Dim block = block_of_rows(vectors_of(in.width, dtype, wide));
    const Dim grid = {blocks_for(ceil_div(in.rows, block.y), kMostBlocks), 1, 1};
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        if (in.bias) return launch(norm_kernel<T, vector(), true>, grid, block, 0, stream, in);
        launch(norm_kernel<T, vector(), false>, grid, block, 0, stream, in);
    });
}

std::int64_t norm_parts(std::int64_t rows, std::int64_t width, Dtype dtype, bool wide) {
    const Dim block = block_of_rows(vectors_of(width, dtype, wide));
    return blocks_for(ceil_div(rows, block.y), kShares) * std::int64_t{block.y};
}

void norm_backward(const NormBackward& in, Dtype dtype, bool wide, Stream stream) {
    if (in.rows == 0 || in.width == 0) return;
    const Dim block = block_of_rows(vectors_of(in.width, dtype, wide));
    const Dim grid = {blocks_for(ceil_div(in.rows, block.y), kShares), 1, 1};
    const std::int64_t bytes = std::int64_t{block.y} * in.width * (in.mean ? 2 : 1) * std::int64_t{sizeof(float)};
    const bool shared = bytes <= kMostShared;
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        const std::int64_t memory = shared ? bytes : 0;
        if (in.mean) return launch(norm_backward_kernel<T, vector(), true>, grid, block, memory, stream, in, shared);
        launch(norm_backward_kernel<T, vector(), false>, grid, block, memory, stream, in, shared);
    });
}

void column_sums(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t width, void* out, Dtype dtype,
                 bool wide, Stream stream) {
    if (width == 0) return;
    const Dim grid = {static_cast<unsigned>(ceil_div(width, kWarp)), 1, 1};
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        launch(column_sums_kernel<T>, grid, Dim{kWarp, kWarp, 1}, 0, stream, parts, count, stride, width, vector(),
               static_cast<T*>(out));
    });
}

}  // namespace megacore::gpu
