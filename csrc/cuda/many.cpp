#include "many.h"

#include <algorithm>

namespace megacore::gpu {
namespace {

void check_run(const Tensor& tensor, const Tensor& weight, ScalarType dtype, const char* name, std::size_t index) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == weight.numel() && tensor.scalar_type() == dtype &&
                        tensor.is_cpu() == weight.is_cpu() && tensor.get_device_index() == weight.get_device_index(),
                    "megacore_cuda: adamw_: ", name, "[", index, "] must be contiguous, where weights[", index,
                    "] lies, with its ", weight.numel(), " elements, ", torch::headeronly::toString(dtype));
}

const float* scalar(const Tensor& tensor, const Tensor& weight, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() == weight.is_cpu(), "megacore_cuda: adamw_: ", name, " must lie where weights do");
    return floats_of(tensor, 1, name);
}

}  // namespace

Tensor squares_op(std::vector<Tensor> tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "megacore_cuda: squares of no tensor: there is no device to be on");
    const auto count = static_cast<std::int64_t>(tensors.size());
    const Tensor out = torch::stable::new_empty(tensors[0], std::vector<std::int64_t>{count}, ScalarType::Double);
    const OnDevice device(tensors[0]);
    std::vector<Tensor> kept;  // until the launch: else the next copy would take its place
    for (std::int64_t begin = 0; begin < count; begin += kTensors) {
        Squares table = {};
        table.count = static_cast<std::int32_t>(std::min<std::int64_t>(kTensors, count - begin));
        for (std::int32_t i = 0; i < table.count; ++i) {
            const Tensor& tensor = tensors[static_cast<std::size_t>(begin + i)];
            STD_TORCH_CHECK(tensor.is_cpu() == out.is_cpu() && tensor.get_device_index() == out.get_device_index(),
                            "megacore_cuda: squares: tensors on several devices");
            kept.push_back(torch::stable::contiguous(tensor));
            table.tensors[i] = kept.back().const_data_ptr();
            table.numel[i] = tensor.numel();
            table.dtype[i] = static_cast<std::int8_t>(dtype_of(tensor, "a tensor"));
            table.first[i + 1] = table.first[i] + static_cast<std::int32_t>(squares_blocks(tensor.numel()));
        }
        kept.push_back(torch::stable::new_empty(tensors[0], std::vector<std::int64_t>{table.first[table.count]},
                                                ScalarType::Double));
        squares(table, static_cast<double*>(kept.back().mutable_data_ptr()),
                static_cast<double*>(out.mutable_data_ptr()) + begin, device.stream);
    }
    return out;
}

void adamw_(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> first, std::vector<Tensor> second,
            std::vector<Tensor> copies, Tensor clock, Tensor taken, std::vector<double> lr,
            std::vector<double> weight_decay, bool coupled, double beta1, double beta2, double eps) {
    const std::size_t count = weights.size();
    STD_TORCH_CHECK(grads.size() == count && first.size() == count && second.size() == count && lr.size() == count &&
                        weight_decay.size() == count && (copies.empty() || copies.size() == count),
                    "megacore_cuda: adamw_: lists of different lengths");
    if (count == 0) return;
    const Dtype grad = dtype_of(grads[0], "grads[0]"), moment = dtype_of(first[0], "first[0]");
    STD_TORCH_CHECK(moment != Dtype::f16, "megacore_cuda: adamw_: moments must be float32 or bfloat16");
    const OnDevice device(weights[0]);
    for (std::size_t begin = 0; begin < count; begin += kTensors) {
        AdamW table = {};
        table.count = static_cast<std::int32_t>(std::min<std::size_t>(kTensors, count - begin));
        table.clock = scalar(clock, weights[0], "clock");
        table.taken = scalar(taken, weights[0], "taken");
        table.beta1 = beta1;
        table.beta2 = beta2;
        table.eps = static_cast<float>(eps);
        for (std::int32_t i = 0; i < table.count; ++i) {
            const std::size_t j = begin + static_cast<std::size_t>(i);
            const Tensor& weight = weights[j];
            check_run(weight, weight, ScalarType::Float, "weights", j);
            check_like(weight, weights[0], "adamw_: a weight");
            check_run(grads[j], weight, grads[0].scalar_type(), "grads", j);
            check_run(first[j], weight, first[0].scalar_type(), "first", j);
            check_run(second[j], weight, first[0].scalar_type(), "second", j);
            if (!copies.empty()) check_run(copies[j], weight, ScalarType::BFloat16, "copies", j);
            table.weights[i] = static_cast<float*>(weight.mutable_data_ptr());
            table.grads[i] = grads[j].const_data_ptr();
            table.first_moments[i] = first[j].mutable_data_ptr();
            table.second_moments[i] = second[j].mutable_data_ptr();
            table.copies[i] = copies.empty() ? nullptr : copies[j].mutable_data_ptr();
            table.numel[i] = weight.numel();
            table.lr[i] = lr[j];
            table.keep[i] = static_cast<float>(coupled ? 1 : 1 - lr[j] * weight_decay[j]);
            table.pull[i] = static_cast<float>(coupled ? weight_decay[j] : 0);
            table.first[i + 1] = table.first[i] + static_cast<std::int32_t>(adamw_blocks(weight.numel()));
            Wide wide(Dtype::f32, 0);
            for (const void* each : {static_cast<const void*>(table.weights[i]), table.grads[i],
                                     static_cast<const void*>(table.first_moments[i]),
                                     static_cast<const void*>(table.second_moments[i]),
                                     static_cast<const void*>(table.copies[i])}) {
                wide.at(each);
            }
            table.wide[i] = wide.yes();
        }
        adamw(table, grad, moment, device.stream);
    }
}

}  // namespace megacore::gpu
