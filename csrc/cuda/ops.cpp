// torch.ops.megacore_cuda, through torch's stable ABI: one build serves torch 2.10 and later, on machines with and
// without a GPU. Shapes and meanings: megacore/kernels/reference.py; fakes and gradients: megacore/kernels/cuda.
#include <algorithm>
#include <tuple>

#include "many.h"
#include "tensors.h"

namespace megacore::gpu {
namespace {

constexpr std::int64_t kInterface = 1;  // as in megacore/kernels/cuda/library.py

std::int64_t interface() { return kInterface; }

bool emulated() {
#ifdef MEGACORE_EMULATED
    return true;
#else
    return false;
#endif
}

// ---- norms ----------------------------------------------------------------------------------------------------------

struct Normed {
    Tensor y, total, mean, inverse;
};

Normed normalise(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                 const std::optional<Tensor>& bias, double eps, double offset) {
    const Dtype dtype = dtype_of(x, "x");
    const Rows rows = rows_of(x, "x");
    if (residual) check_shape(*residual, x, "residual");
    const Rows added = residual ? rows_of(*residual, "residual") : rows;
    const Tensor factor = vector_of(weight, rows.width, x, "weight");
    const Tensor shift = bias ? vector_of(*bias, rows.width, x, "bias") : factor;
    Normed out{new_like(x), residual ? new_like(x) : factor, floats(x, {bias ? rows.count : 0}), floats(x, {rows.count})};
    Wide wide(dtype, rows.width);
    wide.rows(rows).rows(added).at(factor.const_data_ptr()).at(shift.const_data_ptr());
    wide.at(out.y.const_data_ptr()).at(out.total.const_data_ptr());
    const OnDevice device(x);
    norm({rows.data(), residual ? added.data() : nullptr, factor.const_data_ptr(),
          bias ? shift.const_data_ptr() : nullptr, out.y.mutable_data_ptr(),
          residual ? out.total.mutable_data_ptr() : nullptr, bias ? write_floats(out.mean) : nullptr,
          write_floats(out.inverse), rows.count, rows.width, rows.stride, added.stride, static_cast<float>(eps),
          static_cast<float>(offset)},
         dtype, wide.yes(), device.stream);
    return out;
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, double offset) {
    const Normed out = normalise(x, std::nullopt, weight, std::nullopt, eps, offset);
    return {out.y, out.inverse};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_add(Tensor x, Tensor residual, Tensor weight, double eps, double offset) {
    const Normed out = normalise(x, residual, weight, std::nullopt, eps, offset);
    return {out.y, out.total, out.inverse};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps) {
    const Normed out = normalise(x, std::nullopt, weight, bias, eps, 0);
    return {out.y, out.mean, out.inverse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_add(Tensor x, Tensor residual, Tensor weight, Tensor bias,
                                                          double eps) {
    const Normed out = normalise(x, residual, weight, bias, eps, 0);
    return {out.y, out.total, out.mean, out.inverse};
}

struct NormGradients {
    Tensor x, weight, bias;
};

NormGradients normalise_backward(const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x,
                                 const Tensor& weight, const std::optional<Tensor>& mean, const Tensor& inverse,
                                 double offset) {
    const Dtype dtype = dtype_of(x, "x");
    check_shape(grad, x, "grad");
    if (grad_total) check_shape(*grad_total, x, "grad_total");
    const Rows rows = rows_of(x, "x"), grads = rows_of(grad, "grad");
    const Rows totals = grad_total ? rows_of(*grad_total, "grad_total") : grads;
    const Tensor factor = vector_of(weight, rows.width, x, "weight");
    const float* inverses = floats_of(inverse, rows.count, "inverse");
    const float* means = mean ? floats_of(*mean, rows.count, "mean") : nullptr;
    NormGradients out{new_like(x), torch::stable::new_zeros(weight, weight.sizes()), weight};
    if (mean) out.bias = torch::stable::new_zeros(weight, weight.sizes());
    if (rows.count == 0 || rows.width == 0) return out;
    Wide wide(dtype, rows.width);
    wide.rows(rows).rows(grads).rows(totals).at(factor.const_data_ptr()).at(out.x.const_data_ptr());
    const std::int64_t shares = norm_parts(rows.count, rows.width, dtype, wide.yes()), kinds = mean ? 2 : 1;
    const Tensor parts = floats(x, {shares, kinds, rows.width});
    const OnDevice device(x);
    norm_backward({grads.data(), grad_total ? totals.data() : nullptr, rows.data(), factor.const_data_ptr(), means,
                   inverses, out.x.mutable_data_ptr(), write_floats(parts), rows.count, rows.width, grads.stride,
                   totals.stride, rows.stride, static_cast<float>(offset)},
                  dtype, wide.yes(), device.stream);
    for (std::int64_t kind = 0; kind < kinds; ++kind) {
        column_sums(write_floats(parts) + kind * rows.width, shares, kinds * rows.width, rows.width,
                    (kind ? out.bias : out.weight).mutable_data_ptr(), dtype, wide.yes(), device.stream);
    }
    return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, std::optional<Tensor> grad_total, Tensor x, Tensor weight,
                                             Tensor inverse, double offset) {
    const NormGradients out = normalise_backward(grad, grad_total, x, weight, std::nullopt, inverse, offset);
    return {out.x, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, std::optional<Tensor> grad_total, Tensor x,
                                                       Tensor weight, Tensor mean, Tensor inverse) {
    const NormGradients out = normalise_backward(grad, grad_total, x, weight, mean, inverse, 0);
    return {out.x, out.weight, out.bias};
}

// ---- activations ----------------------------------------------------------------------------------------------------

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::silu;
    STD_TORCH_CHECK(name == "gelu", "megacore_cuda: activation '", name, "' is neither silu nor gelu");
    return Activation::gelu;
}

Tensor gated_op(Tensor x, std::string activation) {
    const Dtype dtype = dtype_of(x, "x");
    const Rows rows = rows_of(x, "x");
    STD_TORCH_CHECK(rows.width % 2 == 0, "megacore_cuda: rows of ", rows.width, " cannot be halved into gate and up");
    std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = rows.width / 2;
    const Tensor out = torch::stable::new_empty(x, shape);
    Wide wide(dtype, rows.width / 2);
    wide.rows(rows).at(out.const_data_ptr());
    const OnDevice device(x);
    gated({rows.data(), nullptr, out.mutable_data_ptr(), rows.count, rows.width / 2, rows.stride, 0,
           activation_of(activation)},
          dtype, wide.yes(), device.stream);
    return out;
}

Tensor gated_backward(Tensor grad, Tensor x, std::string activation) {
    const Dtype dtype = dtype_of(x, "x");
    check_like(grad, x, "grad");
    const Rows rows = rows_of(x, "x"), grads = rows_of(grad, "grad");
    STD_TORCH_CHECK(grads.count == rows.count && 2 * grads.width == rows.width,
                    "megacore_cuda: grad must have the rows of x, half as wide");
    const Tensor out = new_like(x);
    Wide wide(dtype, grads.width);
    wide.rows(rows).rows(grads).at(out.const_data_ptr());
    const OnDevice device(x);
    gated({rows.data(), grads.data(), out.mutable_data_ptr(), rows.count, grads.width, rows.stride, grads.stride,
           activation_of(activation)},
          dtype, wide.yes(), device.stream);
    return out;
}

Tensor bias_gelu_op(Tensor x, Tensor bias) {
    const Dtype dtype = dtype_of(x, "x");
    const Rows rows = rows_of(x, "x");
    const Tensor shift = vector_of(bias, rows.width, x, "bias"), out = new_like(x);
    Wide wide(dtype, rows.width);
    wide.rows(rows).at(shift.const_data_ptr()).at(out.const_data_ptr());
    const OnDevice device(x);
    bias_gelu({rows.data(), shift.const_data_ptr(), nullptr, out.mutable_data_ptr(), nullptr, rows.count, rows.width,
               rows.stride, 0},
              dtype, wide.yes(), device.stream);
    return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) {
    const Dtype dtype = dtype_of(x, "x");
    check_shape(grad, x, "grad");
    const Rows rows = rows_of(x, "x"), grads = rows_of(grad, "grad");
    const Tensor shift = vector_of(bias, rows.width, x, "bias"), out = new_like(x);
    const Tensor grad_bias = torch::stable::new_zeros(bias, bias.sizes());
    if (rows.count == 0 || rows.width == 0) return {out, grad_bias};
    Wide wide(dtype, rows.width);
    wide.rows(rows).rows(grads).at(shift.const_data_ptr()).at(out.const_data_ptr());
    const std::int64_t shares = bias_gelu_parts(rows.count, rows.width, dtype, wide.yes());
    const Tensor parts = floats(x, {shares, rows.width});
    const OnDevice device(x);
    bias_gelu({rows.data(), shift.const_data_ptr(), grads.data(), out.mutable_data_ptr(), write_floats(parts),
               rows.count, rows.width, rows.stride, grads.stride},
              dtype, wide.yes(), device.stream);
    column_sums(write_floats(parts), shares, rows.width, rows.width, grad_bias.mutable_data_ptr(), dtype, wide.yes(),
                device.stream);
    return {out, grad_bias};
}

// ---- rotary positions -----------------------------------------------------------------------------------------------

void turn(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out, bool apart, bool back) {
    const Dtype dtype = dtype_of(x, "x");
    STD_TORCH_CHECK(x.dim() == 4, "megacore_cuda: rope turns x [b, s, n, d], not ", x.dim(), " dims");
    check_like(cos, x, "cos");
    check_shape(sin, cos, "sin");
    STD_TORCH_CHECK(cos.dim() == 4 && (cos.size(0) == 1 || cos.size(0) == x.size(0)) && cos.size(1) == x.size(1) &&
                        cos.size(2) == 1 && 2 * cos.size(3) <= x.size(3),
                    "megacore_cuda: cos and sin must be [1 or b, s, 1, r / 2] with r <= d for x [b, s, n, d]");
    STD_TORCH_CHECK(x.numel() == 0 || x.numel() / x.size(3) < (std::int64_t{1} << 32),
                    "megacore_cuda: rope turns less than 2^32 heads at once");
    const Tensor c = torch::stable::contiguous(cos), s = torch::stable::contiguous(sin);
    const std::int64_t pairs = cos.size(3), angle_b = cos.size(0) > 1 ? cos.size(1) * pairs : 0;
    Wide wide(dtype, x.size(3));
    for (const Tensor& each : {x, out}) {
        wide.at(each.const_data_ptr()).stride(each.stride(0)).stride(each.stride(1)).stride(each.stride(2));
    }
    wide.stride(2 * pairs).at(c.const_data_ptr()).at(s.const_data_ptr());
    wide.stride(pairs);  // each token's angles begin at whole vectors
    const OnDevice device(x);
    rope({x.const_data_ptr(), c.const_data_ptr(), s.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(1),
          x.size(2), x.size(3), pairs, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1),
          out.stride(2), angle_b, apart, back},
         dtype, wide.yes(), device.stream);
}

Tensor rope_op(Tensor x, Tensor cos, Tensor sin, bool apart, bool back) {
    STD_TORCH_CHECK(x.dim() == 4, "megacore_cuda: rope turns x [b, s, n, d], not ", x.dim(), " dims");
    const Tensor from = x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
    const Tensor out = new_like(from);
    turn(from, cos, sin, out, apart, back);
    return out;
}

void rope_(Tensor x, Tensor cos, Tensor sin, bool apart, bool back) {
    STD_TORCH_CHECK(x.dim() == 4 && (x.size(3) <= 1 || x.stride(3) == 1),
                    "megacore_cuda: rope_ turns x [b, s, n, d] whose heads lie in one piece");
    turn(x, cos, sin, x, apart, back);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

Tensor softmax_op(Tensor scores, std::optional<Tensor> mask, bool causal, double scale) {
    const Dtype dtype = dtype_of(scores, "scores");
    STD_TORCH_CHECK(scores.dim() == 4, "megacore_cuda: softmax takes scores [b, n, q, k], not ", scores.dim(), " dims");
    const Rows rows = rows_of(scores, "scores");
    std::int64_t strides[4] = {0, 0, 0, 0};
    if (mask) {
        STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() <= 4 &&
                            mask->get_device_index() == scores.get_device_index() && mask->is_cpu() == scores.is_cpu(),
                        "megacore_cuda: the mask must be boolean, of at most 4 dims, and lie where the scores do");
        for (std::int64_t i = 4 - mask->dim(), j = 0; i < 4; ++i, ++j) {
            STD_TORCH_CHECK(mask->size(j) == 1 || mask->size(j) == scores.size(i), "megacore_cuda: a mask of ",
                            mask->size(j), " in dim ", j, " does not broadcast to scores of ", scores.size(i));
            strides[i] = mask->size(j) == 1 ? 0 : mask->stride(j);
        }
    }
    const Tensor out = new_like(scores);
    Wide wide(dtype, rows.width);
    wide.rows(rows).at(out.const_data_ptr());
    const OnDevice device(scores);
    softmax({rows.data(), mask ? static_cast<const std::uint8_t*>(mask->const_data_ptr()) : nullptr,
             out.mutable_data_ptr(), scores.size(0), scores.size(1), scores.size(2), scores.size(3), rows.stride,
             strides[0], strides[1], strides[2], strides[3], causal, static_cast<float>(scale)},
            dtype, wide.yes(), device.stream);
    return out;
}

Tensor softmax_backward_op(Tensor grad, Tensor out, double scale) {
    const Dtype dtype = dtype_of(out, "out");
    check_shape(grad, out, "grad");
    const Rows rows = rows_of(out, "out"), grads = rows_of(grad, "grad");
    const Tensor result = new_like(out);
    Wide wide(dtype, rows.width);
    wide.rows(rows).rows(grads).at(result.const_data_ptr());
    const OnDevice device(out);
    softmax_backward({grads.data(), rows.data(), result.mutable_data_ptr(), rows.count, rows.width, grads.stride,
                      rows.stride, static_cast<float>(scale)},
                     dtype, wide.yes(), device.stream);
    return result;
}

std::tuple<Tensor, Tensor, Tensor> logit_statistics_op(Tensor logits, Tensor target) {
    const Dtype dtype = dtype_of(logits, "logits");
    STD_TORCH_CHECK(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0) &&
                        target.scalar_type() == ScalarType::Long,
                    "megacore_cuda: logit_statistics takes logits [t, v] and int64 targets [t]");
    const Rows rows = rows_of(logits, "logits");
    const Tensor wanted = torch::stable::contiguous(target);
    const Tensor largest = floats(logits, {rows.count}), sums = floats(logits, {3, rows.count}), exp = new_like(logits);
    Wide wide(dtype, rows.width);
    wide.rows(rows).at(exp.const_data_ptr());
    const OnDevice device(logits);
    logit_statistics({rows.data(), static_cast<const std::int64_t*>(wanted.const_data_ptr()), write_floats(largest),
                      write_floats(sums), exp.mutable_data_ptr(), rows.count, rows.width, rows.stride},
                     dtype, wide.yes(), device.stream);
    return {largest, sums, exp};
}

// ---- FP8 ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantise_op(Tensor x, Tensor scale, bool gradient) {
    const Dtype dtype = dtype_of(x, "x");
    STD_TORCH_CHECK(scale.is_cpu() == x.is_cpu(), "megacore_cuda: the scale must lie where x does");
    const float* factor = floats_of(scale, 1, "scale");
    const Tensor flat = torch::stable::contiguous(x);
    const Tensor codes =
        torch::stable::new_empty(x, x.sizes(), gradient ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn);
    const Tensor largest = torch::stable::new_zeros(x, std::vector<std::int64_t>{}, ScalarType::Float);
    Wide wide(dtype, 0);
    wide.at(flat.const_data_ptr()).at(codes.const_data_ptr());
    const OnDevice device(x);
    quantise({flat.const_data_ptr(), factor, static_cast<std::uint8_t*>(codes.mutable_data_ptr()),
              static_cast<std::uint32_t*>(largest.mutable_data_ptr()), flat.numel(), gradient},
             dtype, wide.yes(), device.stream);
    return {codes, largest};
}

}  // namespace
}  // namespace megacore::gpu

#ifdef MEGACORE_EMULATED
#define MEGACORE_DEVICE CPU
#else
#define MEGACORE_DEVICE CUDA
#endif

STABLE_TORCH_LIBRARY(megacore_cuda, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)");
    m.def("rms_norm_add(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)");
    m.def(
        "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor inverse, float offset) -> "
        "(Tensor, Tensor)");
    m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
    m.def(
        "layer_norm_add(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor mean, Tensor inverse) -> "
        "(Tensor, Tensor, Tensor)");
    m.def("gated(Tensor x, str activation) -> Tensor");
    m.def("gated_backward(Tensor grad, Tensor x, str activation) -> Tensor");
    m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
    m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
    m.def("rope(Tensor x, Tensor cos, Tensor sin, bool apart, bool back) -> Tensor");
    m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool apart, bool back) -> ()");
    m.def("softmax(Tensor scores, Tensor? mask, bool causal, float scale) -> Tensor");
    m.def("softmax_backward(Tensor grad, Tensor out, float scale) -> Tensor");
    m.def("logit_statistics(Tensor logits, Tensor target) -> (Tensor, Tensor, Tensor)");
    m.def("squares(Tensor[] tensors) -> Tensor");
    m.def("quantise(Tensor x, Tensor scale, bool gradient) -> (Tensor, Tensor)");
    m.def(
        "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] copies, "
        "Tensor clock, Tensor taken, float[] lr, float[] weight_decay, bool coupled, float beta1, float beta2, "
        "float eps) -> ()");
    m.def("interface() -> int");
    m.def("emulated() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(megacore_cuda, MEGACORE_DEVICE, m) {
    using namespace megacore::gpu;
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("rms_norm_add", TORCH_BOX(&rms_norm_add));
    m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("layer_norm_add", TORCH_BOX(&layer_norm_add));
    m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
    m.impl("gated", TORCH_BOX(&gated_op));
    m.impl("gated_backward", TORCH_BOX(&gated_backward));
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu_op));
    m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
    m.impl("rope", TORCH_BOX(&rope_op));
    m.impl("rope_", TORCH_BOX(&rope_));
    m.impl("softmax", TORCH_BOX(&softmax_op));
    m.impl("softmax_backward", TORCH_BOX(&softmax_backward_op));
    m.impl("logit_statistics", TORCH_BOX(&logit_statistics_op));
    m.impl("squares", TORCH_BOX(&squares_op));
    m.impl("quantise", TORCH_BOX(&quantise_op));
    m.impl("adamw_", TORCH_BOX(&adamw_));
}

STABLE_TORCH_LIBRARY_IMPL(megacore_cuda, CompositeExplicitAutograd, m) {
    using namespace megacore::gpu;
    m.impl("interface", TORCH_BOX(&interface));
    m.impl("emulated", TORCH_BOX(&emulated));
}
