// What each file of kernels offers: plain pointers in device memory, launched on a stream. Throws std::runtime_error.
//
// Elements of a row lie one behind the other; `stride_*` are elements from row to row. Where `wide`, all rows begin at
// multiples of 16 bytes and their widths are whole vectors of 16 bytes. Arithmetic is in float32.
#pragma once

#include <cstdint>

namespace megacore::gpu {

using Stream = void*;  // a cudaStream_t

enum class Dtype { f32, bf16, f16 };

constexpr std::int64_t kMostBlocks = std::int64_t{1} << 20;  // of a grid's x; rows beyond are taken in turns

// y = n (weight + offset) + bias, n = (x - mean) inverse. `residual` is added to x first, and `total` is that sum.
// Null where not wanted: residual and total; bias and mean (RMSNorm).
struct Norm {
    const void* x;
    const void* residual;
    const void* weight;
    const void* bias;
    void* y;
    void* total;
    float* mean;
    float* inverse;
    std::int64_t rows, width, stride_x, stride_residual;
    float eps, offset;
};
void norm(const Norm& in, Dtype dtype, bool wide, Stream stream);

// Gradients of x and, as shares of them in `parts` [norm_parts(), 1 or 2 (with a bias), width], of weight and bias.
// `grad_total`, if any, is what comes back through `total`.
struct NormBackward {
    const void* grad;
    const void* grad_total;
    const void* x;
    const void* weight;
    const float* mean;  // null: RMSNorm
    const float* inverse;
    void* grad_x;
    float* parts;
    std::int64_t rows, width, stride_grad, stride_total, stride_x;
    float offset;
};
std::int64_t norm_parts(std::int64_t rows, std::int64_t width, Dtype dtype, bool wide);
void norm_backward(const NormBackward& in, Dtype dtype, bool wide, Stream stream);

// out [width] = the sum of rows of parts, `stride` apart. Columns of parts lie as threads own them (shares.h).
void column_sums(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t width, void* out, Dtype dtype,
                 bool wide, Stream stream);

enum class Activation { silu, gelu };

// y [rows, width] = act(gate) up of x = [gate, up]; with `grad` [rows, width], out is the gradient of x.
struct Gated {
    const void* x;
    const void* grad;
    void* out;
    std::int64_t rows, width, stride_x, stride_grad;
    Activation activation;
};
void gated(const Gated& in, Dtype dtype, bool wide, Stream stream);

// out = gelu(x + bias); with `grad`, the gradient of x, and shares of the bias's in `parts` [bias_gelu_parts(), width].
struct BiasGelu {
    const void* x;
    const void* bias;
    const void* grad;
    void* out;
    float* parts;
    std::int64_t rows, width, stride_x, stride_grad;
};
std::int64_t bias_gelu_parts(std::int64_t rows, std::int64_t width, Dtype dtype, bool wide);
void bias_gelu(const BiasGelu& in, Dtype dtype, bool wide, Stream stream);

// x and out [b, s, n, size], elements of a head one behind the other; cos and sin [1 or b, s, pairs]. out may be x.
struct Rope {
    const void* x;
    const void* cos;
    const void* sin;
    void* out;
    std::int64_t batch, seq, heads, size, pairs;
    std::int64_t x_b, x_s, x_n, out_b, out_s, out_n, angle_b;
    bool apart;  // pairs (i, i + pairs), else (2i, 2i + 1)
    bool back;   // by the opposite angles
};
// `wide`: also 2 pairs, and where they lie apart pairs, are whole vectors; so are the angles' rows.
void rope(const Rope& in, Dtype dtype, bool wide, Stream stream);

// Over the keys of scores [batch, heads, queries, keys]. `mask`, bytes of any strides, may be null.
struct Softmax {
    const void* scores;
    const std::uint8_t* mask;
    void* out;
    std::int64_t batch, heads, queries, keys, stride_row, mask_b, mask_n, mask_q, mask_k;
    bool causal;
    float scale;
};
void softmax(const Softmax& in, Dtype dtype, bool wide, Stream stream);

// p (grad - sum(grad p)) scale, p = softmax's output.
struct SoftmaxBackward {
    const void* grad;
    const void* out;
    void* grad_scores;
    std::int64_t rows, width, stride_grad, stride_out;
    float scale;
};
void softmax_backward(const SoftmaxBackward& in, Dtype dtype, bool wide, Stream stream);

// Per row the largest logit; sums [3, rows] of exp(logit - largest), of the target's logit, of logits; all exp.
struct Statistics {
    const void* logits;
    const std::int64_t* target;
    float* largest;
    float* sums;
    void* exp;
    std::int64_t rows, width, stride;
};
void logit_statistics(const Statistics& in, Dtype dtype, bool wide, Stream stream);

// codes = x scale in E4M3 or, with `gradient`, E5M2; the bits of the largest |x| are raised to at least x's.
struct Quantise {
    const void* x;
    const float* scale;
    std::uint8_t* codes;
    std::uint32_t* largest;
    std::int64_t numel;
    bool gradient;
};
void quantise(const Quantise& in, Dtype dtype, bool wide, Stream stream);

// Many tensors at once: a table of them travels with the launch. `first` is the block that begins with a tensor.
constexpr int kTensors = 256;  // of a launch; its parameters may have 32,764 bytes

struct Squares {
    const void* tensors[kTensors];
    std::int64_t numel[kTensors];
    std::int32_t first[kTensors + 1];
    std::int8_t dtype[kTensors];  // a Dtype
    std::int32_t count;
};
std::int64_t squares_blocks(std::int64_t numel);
// parts: a double for each block; out: a double for each tensor.
void squares(const Squares& in, double* parts, double* out, Stream stream);

struct AdamW {
    float* weights[kTensors];
    const void* grads[kTensors];
    void* first_moments[kTensors];
    void* second_moments[kTensors];
    void* copies[kTensors];  // bf16, or null
    std::int64_t numel[kTensors];
    double lr[kTensors];
    float keep[kTensors];  // AdamW: 1 - lr * weight decay; Adam: 1
    float pull[kTensors];  // AdamW: 0; Adam: weight decay, which pulls on the gradient
    std::int32_t first[kTensors + 1];
    bool wide[kTensors];  // everything at multiples of 16 bytes
    std::int32_t count;
    const float* clock;
    const float* taken;
    double beta1, beta2;
    float eps;
};
std::int64_t adamw_blocks(std::int64_t numel);
void adamw(const AdamW& in, Dtype grad, Dtype moment, Stream stream);

}  // namespace megacore::gpu
