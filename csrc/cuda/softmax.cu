// Softmax over keys, causal and masked, and what cross-entropy over a split vocabulary wants to know of its logits.
#include "device.h"

namespace megacore::gpu {
namespace {

constexpr float kNothing = -INFINITY;

// A row of scores as it is seen: times scale, -inf where a key is not visible. Masks are read once for what registers
// hold.
template <typename T, int V>
struct Seen {
    float own[kHeld][V];
    const T* row;
    const std::uint8_t* mask;
    std::int64_t mask_k, width, visible;  // keys from `visible` on are not
    float scale;

    __device__ __forceinline__ void take(const Vec<T, V>& values, std::int64_t column, float* to) const {
        MEGACORE_UNROLL
        for (int i = 0; i < V; ++i) {
            const std::int64_t key = column + i;
            const bool seen = key < visible && (!mask || mask[key * mask_k]);
            to[i] = seen ? static_cast<float>(values.at[i]) * scale : kNothing;
        }
    }

    __device__ __forceinline__ void read() {
        MEGACORE_UNROLL
        for (int k = 0; k < kHeld; ++k) {
            const std::int64_t column = Held<T, V>::place(k);
            if (column < width) take(load<V>(row + column), column, own[k]);
        }
    }

    // function(float[V], column) of all vectors of this thread.
    template <typename Function>
    __device__ __forceinline__ void each(const Function& function) {
        MEGACORE_UNROLL
        for (int k = 0; k < kHeld; ++k) {
            const std::int64_t column = Held<T, V>::place(k);
            if (column < width) function(own[k], column);
        }
        for (std::int64_t column = Held<T, V>::place(kHeld); column < width; column += std::int64_t{blockDim.x} * V) {
            float values[V];
            take(load<V>(row + column), column, values);
            function(values, column);
        }
    }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) softmax_kernel(Softmax in) {
    const std::int64_t rows = in.batch * in.heads * in.queries, step = std::int64_t{gridDim.x} * blockDim.y;
    for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows; row += step) {
        const std::int64_t query = row % in.queries, of_head = row / in.queries;
        const std::int64_t head = of_head % in.heads, sample = of_head / in.heads;
        Seen<T, V> seen;
        seen.row = static_cast<const T*>(in.scores) + row * in.stride_row;
        seen.mask = in.mask ? in.mask + sample * in.mask_b + head * in.mask_n + query * in.mask_q : nullptr;
        seen.mask_k = in.mask_k;
        seen.width = in.keys;
        seen.visible = in.causal ? query + (in.keys - in.queries) + 1 : in.keys;  // the last query sees all keys
        seen.scale = in.scale;
        seen.read();
        float top = kNothing;
        seen.each([&](const float* values, std::int64_t) {
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) top = Largest::of(top, values[i]);
        });
        top = over_row<Largest>(top, kNothing);
        if (top == kNothing) top = 0;  // a row that sees nothing: its weights are exp(-inf)
        float total = 0;
        seen.each([&](const float* values, std::int64_t) {
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) total += fast_exp(values[i] - top);
        });
        total = over_row<Sum>(total, 0.0f);
        const float part = total == 0 ? 1.0f : 1.0f / total;
        T* out = static_cast<T*>(in.out) + row * in.keys;
        seen.each([&](const float* values, std::int64_t column) {
            Vec<T, V> weights;
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) weights.at[i] = T(fast_exp(values[i] - top) * part);
            store<V>(out + column, weights);
        });
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) softmax_backward_kernel(SoftmaxBackward in) {
    const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
    for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < in.rows; row += step) {
        const T* grad = static_cast<const T*>(in.grad) + row * in.stride_grad;
        Held<T, V> weights(static_cast<const T*>(in.out) + row * in.stride_out, in.width);
        float product = 0;
        weights.each([&](const Vec<T, V>& p, std::int64_t column) {
            const Vec<T, V> g = load<V>(grad + column);
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) product += static_cast<float>(p.at[i]) * static_cast<float>(g.at[i]);
        });
        product = over_row<Sum>(product, 0.0f);
        T* out = static_cast<T*>(in.grad_scores) + row * in.width;
        weights.each([&](const Vec<T, V>& p, std::int64_t column) {
            const Vec<T, V> g = load<V>(grad + column);  // from a cache: this thread has just read it
            Vec<T, V> result;
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float slope = static_cast<float>(g.at[i]) - product;
                result.at[i] = T(static_cast<float>(p.at[i]) * slope * in.scale);
            }
            store<V>(out + column, result);
        });
    }
}

constexpr unsigned kMany = 1024;  // threads of a row of logits

template <typename T, int V>
__global__ void __launch_bounds__(kMany) statistics_kernel(Statistics in) {
    const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
    for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < in.rows; row += step) {
        const T* from = static_cast<const T*>(in.logits) + row * in.stride;
        Held<T, V> logits(from, in.width);
        float top = kNothing;
        logits.each([&](const Vec<T, V>& values, std::int64_t) {
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) top = Largest::of(top, static_cast<float>(values.at[i]));
        });
        top = over_row<Largest>(top, kNothing);
        float total = 0, plain = 0;
        T* exp = static_cast<T*>(in.exp) + row * in.width;
        logits.each([&](const Vec<T, V>& values, std::int64_t column) {
            Vec<T, V> weights;
            MEGACORE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float value = static_cast<float>(values.at[i]), weight = fast_exp(value - top);
                total += weight;
                plain += value;
                weights.at[i] = T(weight);
            }
            store<V>(exp + column, weights);
        });
        total = over_row<Sum>(total, 0.0f);
        plain = over_row<Sum>(plain, 0.0f);
        if (threadIdx.x == 0) {
            const std::int64_t wanted = in.target[row];
            in.largest[row] = top;
            in.sums[row] = total;
            in.sums[in.rows + row] = wanted >= 0 && wanted < in.width ? static_cast<float>(from[wanted]) : 0.0f;
            in.sums[2 * in.rows + row] = plain;
        }
    }
}

Dim grid_of(std::int64_t rows, const Dim& block) {
    return {blocks_for(ceil_div(rows, block.y), kMostBlocks), 1, 1};
}

}  // namespace

void softmax(const Softmax& in, Dtype dtype, bool wide, Stream stream) {
    const std::int64_t rows = in.batch * in.heads * in.queries;
    if (rows == 0 || in.keys == 0) return;
    const Dim block = block_of_rows(vectors_of(in.keys, dtype, wide));
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        launch(softmax_kernel<decltype(kind), vector()>, grid_of(rows, block), block, 0, stream, in);
    });
}

void softmax_backward(const SoftmaxBackward& in, Dtype dtype, bool wide, Stream stream) {
    if (in.rows == 0 || in.width == 0) return;
    const Dim block = block_of_rows(vectors_of(in.width, dtype, wide));
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        launch(softmax_backward_kernel<decltype(kind), vector()>, grid_of(in.rows, block), block, 0, stream, in);
    });
}

// Rows without a logit have statistics, too.
void logit_statistics(const Statistics& in, Dtype dtype, bool wide, Stream stream) {
    if (in.rows == 0) return;
    const Dim block = block_of_rows(vectors_of(in.width, dtype, wide), kMany);
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        launch(statistics_kernel<decltype(kind), vector()>, grid_of(in.rows, block), block, 0, stream, in);
    });
}

}  // namespace megacore::gpu
