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
#include <string>
#include <vector>

#include "adamw.h"

namespace {

using megacore::BFloat16;
using megacore::Factors;
using megacore::Isa;
using megacore::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr std::int64_t kInterface = 2;  // as in megacore/kernels/native.py
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
    STD_TORCH_CHECK(false, "adamw_: isa '", name, "' is not one of this processor's: ", isas());
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

}  // namespace

STABLE_TORCH_LIBRARY(megacore_cpu, m) {
    m.def(
        "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] copies, "
        "Tensor clock, Tensor taken, float[] lr, float[] weight_decay, bool coupled, float beta1, "
        "float beta2, float eps, str isa) -> ()");
    m.def("isas() -> str");
    m.def("interface() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megacore_cpu, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

STABLE_TORCH_LIBRARY_IMPL(megacore_cpu, CompositeExplicitAutograd, m) {
    m.impl("isas", TORCH_BOX(&isas));
    m.impl("interface", TORCH_BOX(&interface));
}
