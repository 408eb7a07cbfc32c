// torch.ops.megacore_cpu, through torch's stable ABI: one build serves torch 2.10 and later.
//
// Threads are torch's own (torch.set_num_threads): a second pool would fight it for the cores.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "adamw.h"
#include "attention.h"
#include "rows.h"
#include "wgrad.h"

namespace {

using megacore::BFloat16;
using megacore::Factors;
using megacore::Isa;
using megacore::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr std::int64_t kInterface = 6;  // as in megacore/kernels/native.py
constexpr std::int64_t kGrain = 1 << 15;  // elements that are worth a thread

struct Named {
    const char* name;
    Isa isa;
};

constexpr Named kIsas[] = {{"avx512", Isa::avx512}, {"avx2", Isa::avx2}, {"portable", Isa::portable}};

std::int64_t interface() { return kInterface; }

// What this processor can run, best first, separated by spaces.
std::string isas() {
    std::string names;
    for (const Named& each : kIsas) {
        if (!megacore::supported(each.isa)) continue;
        if (!names.empty()) names += ' ';
        names += each.name;
    }
    return names;
}

// The instruction set of that name; the best of this processor for an empty one.
Isa isa_named(const std::string& name) {
    for (const Named& each : kIsas) {
        if (megacore::supported(each.isa) && (name.empty() || name == each.name)) return each.isa;
    }
    STD_TORCH_CHECK(false, "isa '", name, "' is not one of this processor's: ", isas());
}

double scalar(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(), "adamw_: ",
                    name, " must be one float32 in host memory");
    return *tensor.const_data_ptr<float>();
}

void check(const Tensor& tensor, std::int64_t numel, ScalarType dtype, const char* name, std::size_t index) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == numel &&
                        tensor.scalar_type() == dtype,
                    "adamw_: ", name, "[", index, "] must be contiguous in host memory, of the dtype of ", name,
                    "[0], with the ", numel, " elements of weights[", index, "]");
}

struct Arguments {
    const Tensors& weights;
    const Tensors& grads;
    const Tensors& first;
    const Tensors& second;
    const Tensors& copies;
    std::vector<Factors> factors;
    Isa isa;
};

template <typename Grad, typename Moment>
void run(const Arguments& in) {
    std::vector<Span<Grad, Moment>> spans;
    std::vector<std::int64_t> ends;  // where each span ends, were all laid one behind the other
    for (std::size_t i = 0; i < in.weights.size(); ++i) {
        spans.push_back({static_cast<float*>(in.weights[i].mutable_data_ptr()),
                         static_cast<const Grad*>(in.grads[i].const_data_ptr()),
                         static_cast<Moment*>(in.first[i].mutable_data_ptr()),
                         static_cast<Moment*>(in.second[i].mutable_data_ptr()),
                         in.copies.empty() ? nullptr : static_cast<BFloat16*>(in.copies[i].mutable_data_ptr())});
        ends.push_back((ends.empty() ? 0 : ends.back()) + in.weights[i].numel());
    }
    // Threads get equal numbers of elements, whatever the sizes of the spans; where they are cut changes no bit.
    torch::stable::parallel_for(0, ends.back(), kGrain, [&](std::int64_t begin, std::int64_t end) {
        auto i = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
        for (; begin < end; ++i) {
            const std::int64_t start = i ? ends[i - 1] : 0, stop = std::min(end, ends[i]);
            megacore::adamw(in.isa, spans[i], begin - start, stop - start, in.factors[i]);
            begin = stop;
        }
    });
}

// See megacore/kernels/adamw.py. `clock` is the number of this step; where `taken` is 0 nothing is touched.
void adamw_(Tensors weights, Tensors grads, Tensors first, Tensors second, Tensors copies, Tensor clock, Tensor taken,
            std::vector<double> lr, std::vector<double> weight_decay, bool coupled, double beta1, double beta2,
            double eps, std::string isa) {
    const std::size_t count = weights.size();
    STD_TORCH_CHECK(grads.size() == count && first.size() == count && second.size() == count && lr.size() == count &&
                        weight_decay.size() == count && (copies.empty() || copies.size() == count),
                    "adamw_: lists of different lengths");
    Arguments in{weights, grads, first, second, copies, {}, isa_named(isa)};
    if (count == 0 || scalar(taken, "taken") == 0) return;
    const ScalarType grad = grads[0].scalar_type(), moment = first[0].scalar_type();
    const double t = scalar(clock, "clock");
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t numel = weights[i].numel();
        check(weights[i], numel, ScalarType::Float, "weights", i);
        check(grads[i], numel, grad, "grads", i);
        check(first[i], numel, moment, "first", i);
        check(second[i], numel, moment, "second", i);
        if (!copies.empty()) check(copies[i], numel, ScalarType::BFloat16, "copies", i);
        in.factors.push_back({static_cast<float>(coupled ? 1 : 1 - lr[i] * weight_decay[i]),
                              static_cast<float>(coupled ? weight_decay[i] : 0),
                              static_cast<float>(lr[i] / (1 - std::pow(beta1, t))),
                              static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))), static_cast<float>(eps),
                              static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
                              static_cast<float>(1 - beta2)});
    }
    const auto known = [](ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::BFloat16; };
    STD_TORCH_CHECK(known(grad) && known(moment), "adamw_: gradients and moments must be float32 or bfloat16");
    const bool wide_grad = grad == ScalarType::Float, wide_moment = moment == ScalarType::Float;
    if (wide_grad && wide_moment) return run<float, float>(in);
    if (wide_grad) return run<float, BFloat16>(in);
    if (wide_moment) return run<BFloat16, float>(in);
    return run<BFloat16, BFloat16>(in);
}

constexpr std::int64_t kBlock = 32;  // rows whose share of a weight's gradient is summed before the others'

void check_rows(const Tensor& tensor, std::int64_t numel, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == numel &&
                        tensor.scalar_type() == dtype,
                    name, " must be contiguous in host memory, with ", numel, " elements, of the dtype of the others");
}

// Rows that are worth a thread.
std::int64_t grain_of(std::int64_t width) { return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, width)); }

template <typename Function>
void by_dtype(const Tensor& tensor, const Function& function) {
    if (tensor.scalar_type() == ScalarType::Float) return function(float{});
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, "rows must be float32 or bfloat16");
    function(BFloat16{});
}

template <typename T>
const T* read(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// See megacore/kernels/compiled.py. x, y [rows, width], weight [width], inverse [rows].
void rms_norm_(Tensor x, Tensor weight, Tensor y, Tensor inverse, double eps, double offset, std::string isa) {
    const std::int64_t width = weight.numel(), rows = inverse.numel();
    const Isa chosen = isa_named(isa);
    check_rows(x, rows * width, x.scalar_type(), "rms_norm_: x");
    check_rows(y, rows * width, x.scalar_type(), "rms_norm_: y");
    check_rows(weight, width, x.scalar_type(), "rms_norm_: weight");
    check_rows(inverse, rows, ScalarType::Float, "rms_norm_: inverse");
    by_dtype(x, [&](auto kind) {
        using T = decltype(kind);
        const megacore::Norm<T> in{read<T>(x), read<T>(weight), write<T>(y), write<float>(inverse), width,
                                   static_cast<float>(eps), static_cast<float>(offset)};
        torch::stable::parallel_for(0, rows, grain_of(width), [&](std::int64_t begin, std::int64_t end) {
            megacore::norm(chosen, in, begin, end);
        });
    });
}

// parts [rows / kBlock rounded up, width], float32, zeros: shares of the weight's gradient, whatever the threads.
void rms_norm_backward_(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor grad_x, Tensor parts, double offset,
                        std::string isa) {
    const std::int64_t width = weight.numel(), rows = inverse.numel(), blocks = (rows + kBlock - 1) / kBlock;
    const Isa chosen = isa_named(isa);
    for (const Tensor& each : {grad, x, grad_x}) {
        check_rows(each, rows * width, x.scalar_type(), "rms_norm_backward_: grad, x and grad_x");
    }
    check_rows(weight, width, x.scalar_type(), "rms_norm_backward_: weight");
    check_rows(inverse, rows, ScalarType::Float, "rms_norm_backward_: inverse");
    check_rows(parts, blocks * width, ScalarType::Float, "rms_norm_backward_: parts");
    by_dtype(x, [&](auto kind) {
        using T = decltype(kind);
        megacore::NormBackward<T> in{read<T>(grad), read<T>(x), read<T>(weight), read<float>(inverse),
                                     write<T>(grad_x), write<float>(parts), width, static_cast<float>(offset)};
        const std::int64_t grain = std::max<std::int64_t>(1, grain_of(width) / kBlock);
        torch::stable::parallel_for(0, blocks, grain, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t block = begin; block < end; ++block) {
                megacore::NormBackward<T> own = in;
                own.grad_weight += block * width;
                megacore::norm_backward(chosen, own, block * kBlock, std::min(rows, (block + 1) * kBlock));
            }
        });
    });
}

// x [rows, 2 width]; out [rows, width], or with a gradient [rows, width] that of x.
void swiglu_(Tensor x, std::optional<Tensor> grad, Tensor out, std::int64_t width, std::string isa) {
    const std::int64_t rows = width ? x.numel() / (2 * width) : 0;
    const Isa chosen = isa_named(isa);
    check_rows(x, 2 * rows * width, x.scalar_type(), "swiglu_: x");
    check_rows(out, (grad ? 2 : 1) * rows * width, x.scalar_type(), "swiglu_: out");
    if (grad) check_rows(*grad, rows * width, x.scalar_type(), "swiglu_: grad");
    by_dtype(x, [&](auto kind) {
        using T = decltype(kind);
        const megacore::Gated<T> in{read<T>(x), grad ? read<T>(*grad) : nullptr, write<T>(out), width};
        torch::stable::parallel_for(0, rows, grain_of(width), [&](std::int64_t begin, std::int64_t end) {
            if (grad) {
                megacore::gated_backward(chosen, in, begin, end);
            } else {
                megacore::gated(chosen, in, begin, end);
            }
        });
    });
}

// See megacore/kernels/reference.py. logits, exp [t, v], target [t], largest [t], sums [3, t].
void logit_statistics_(Tensor logits, Tensor target, Tensor largest, Tensor sums, Tensor exp, std::string isa) {
    const std::int64_t rows = target.numel(), width = rows ? logits.numel() / rows : 0;
    const Isa chosen = isa_named(isa);
    check_rows(logits, rows * width, logits.scalar_type(), "logit_statistics_: logits");
    check_rows(exp, rows * width, logits.scalar_type(), "logit_statistics_: exp");
    check_rows(target, rows, ScalarType::Long, "logit_statistics_: target");
    check_rows(largest, rows, ScalarType::Float, "logit_statistics_: largest");
    check_rows(sums, 3 * rows, ScalarType::Float, "logit_statistics_: sums");
    by_dtype(logits, [&](auto kind) {
        using T = decltype(kind);
        const megacore::Statistics<T> in{read<T>(logits), read<std::int64_t>(target), write<float>(largest),
                                         write<float>(sums), write<T>(exp), width, rows};
        torch::stable::parallel_for(0, rows, grain_of(width), [&](std::int64_t begin, std::int64_t end) {
            megacore::statistics(chosen, in, begin, end);
        });
    });
}

// into [o, i], float32, += grad^T x of x [t, i] and grad [t, o].
void wgrad_(Tensor into, Tensor x, Tensor grad) {
    STD_TORCH_CHECK(into.dim() == 2 && x.dim() == 2 && grad.dim() == 2 && x.size(0) == grad.size(0),
                    "wgrad_: into [o, i], x [t, i] and grad [t, o] must be matrices of the same tokens");
    const std::int64_t tokens = x.size(0), inputs = into.size(1), outputs = into.size(0);
    check_rows(x, tokens * inputs, x.scalar_type(), "wgrad_: x");
    check_rows(grad, tokens * outputs, x.scalar_type(), "wgrad_: grad");
    check_rows(into, outputs * inputs, ScalarType::Float, "wgrad_: into");
    by_dtype(x, [&](auto kind) {
        using T = decltype(kind);
        STD_TORCH_CHECK(megacore::wgrad_supported(sizeof(T) == 2), "wgrad_: not on this processor");
        const megacore::WeightGradient<T> in{read<T>(x), read<T>(grad), write<float>(into), tokens, inputs, outputs};
        const std::int64_t tiles = (outputs + megacore::kTile - 1) / megacore::kTile;
        const std::int64_t work = std::max<std::int64_t>(1, tokens * inputs * megacore::kTile);  // of a tile
        torch::stable::parallel_for(0, tiles, std::max<std::int64_t>(1, (kGrain << 4) / work),
                                    [&](std::int64_t begin, std::int64_t end) { megacore::wgrad(in, begin, end); });
    });
}

template <typename T, typename Data>
megacore::Heads<T> heads_of(const Tensor& x, Data* data, const Tensor& like, std::int64_t heads, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == like.scalar_type() && x.size(0) == like.size(0) &&
                        x.size(1) == like.size(1) && x.size(2) == heads && x.size(3) == like.size(3) &&
                        x.stride(3) == 1,
                    "attention_: ", name, " must be [b, s, heads, d] as q, with dims that lie together");
    return {static_cast<T*>(data), x.stride(0), x.stride(1), x.stride(2)};
}

// q, y [b, s, n, d], k, v [b, s, m, d], sums [b, n, s]; with `grad`, of y, gradients are written to the last three.
void attention_(Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums, double scale, std::optional<Tensor> grad,
                std::optional<Tensor> grad_q, std::optional<Tensor> grad_k, std::optional<Tensor> grad_v) {
    const std::int64_t batch = q.size(0), length = q.size(1), n = q.size(2), m = k.size(2), dims = q.size(3);
    STD_TORCH_CHECK(m > 0 && n % m == 0 && dims % 2 == 0, "attention_: ", n, " heads of q, ", m, " of k, ", dims,
                    " dims: heads must divide, and dims be even");
    check_rows(sums, batch * n * length, ScalarType::Float, "attention_: sums");
    by_dtype(q, [&](auto kind) {
        using T = decltype(kind);
        STD_TORCH_CHECK(megacore::wgrad_supported(sizeof(T) == 2), "attention_: not on this processor");
        megacore::Attention<T> in{};
        in.q = heads_of<const T>(q, q.const_data_ptr(), q, n, "q");
        in.k = heads_of<const T>(k, k.const_data_ptr(), q, m, "k");
        in.v = heads_of<const T>(v, v.const_data_ptr(), q, m, "v");
        in.y = heads_of<T>(y, y.mutable_data_ptr(), q, n, "y");
        in.sums = write<float>(sums);
        in.batch = batch, in.length = length, in.heads = n, in.groups = n / m, in.dims = dims;
        in.scale = static_cast<float>(scale);
        if (!grad) {
            torch::stable::parallel_for(0, batch * n, 1, [&](std::int64_t begin, std::int64_t end) {
                megacore::attend(in, begin, end);
            });
            return;
        }
        STD_TORCH_CHECK(grad_q && grad_k && grad_v, "attention_: places for all three gradients are needed");
        in.grad = heads_of<const T>(*grad, grad->const_data_ptr(), q, n, "grad");
        in.grad_q = heads_of<T>(*grad_q, grad_q->mutable_data_ptr(), q, n, "grad_q");
        in.grad_k = heads_of<T>(*grad_k, grad_k->mutable_data_ptr(), q, m, "grad_k");
        in.grad_v = heads_of<T>(*grad_v, grad_v->mutable_data_ptr(), q, m, "grad_v");
        torch::stable::parallel_for(0, batch * m, 1, [&](std::int64_t begin, std::int64_t end) {
            megacore::attend_backward(in, begin, end);
        });
    });
}

bool wgrad_supported(bool narrow) { return megacore::wgrad_supported(narrow); }

}  // namespace

STABLE_TORCH_LIBRARY(megacore_cpu, m) {
    m.def(
        "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] copies, "
        "Tensor clock, Tensor taken, float[] lr, float[] weight_decay, bool coupled, float beta1, "
        "float beta2, float eps, str isa) -> ()");
    m.def(
        "rms_norm_(Tensor x, Tensor weight, Tensor(a!) y, Tensor(b!) inverse, float eps, float offset, str isa) -> ()");
    m.def(
        "rms_norm_backward_(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor(a!) grad_x, Tensor(b!) parts, "
        "float offset, str isa) -> ()");
    m.def("swiglu_(Tensor x, Tensor? grad, Tensor(a!) out, int width, str isa) -> ()");
    m.def(
        "logit_statistics_(Tensor logits, Tensor target, Tensor(a!) largest, Tensor(b!) sums, Tensor(c!) exp, str isa) "
        "-> ()");
    m.def(
        "attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) y, Tensor(b!) sums, float scale, Tensor? grad, "
        "Tensor(c!)? grad_q, Tensor(d!)? grad_k, Tensor(e!)? grad_v) -> ()");
    m.def("wgrad_(Tensor(a!) into, Tensor x, Tensor grad) -> ()");
    m.def("wgrad_supported(bool narrow) -> bool");
    m.def("isas() -> str");
    m.def("interface() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megacore_cpu, CPU, m) {
    m.impl("adamw_", TORCH_BOX(&adamw_));
    m.impl("rms_norm_", TORCH_BOX(&rms_norm_));
    m.impl("rms_norm_backward_", TORCH_BOX(&rms_norm_backward_));
    m.impl("swiglu_", TORCH_BOX(&swiglu_));
    m.impl("logit_statistics_", TORCH_BOX(&logit_statistics_));
    m.impl("attention_", TORCH_BOX(&attention_));
    m.impl("wgrad_", TORCH_BOX(&wgrad_));
}

STABLE_TORCH_LIBRARY_IMPL(megacore_cpu, CompositeExplicitAutograd, m) {
    m.impl("isas", TORCH_BOX(&isas));
    m.impl("wgrad_supported", TORCH_BOX(&wgrad_supported));
    m.impl("interface", TORCH_BOX(&interface));
}
