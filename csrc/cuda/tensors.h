// Between torch's tensors and plain pointers: rows, dtypes, streams, and what is said of tensors that do not fit.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#ifndef MEGACORE_EMULATED
#include <dlfcn.h>
#endif

#include "kernels.h"

namespace megacore::gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Dtype::f32;
        case ScalarType::BFloat16: return Dtype::bf16;
        case ScalarType::Half: return Dtype::f16;
        default:
            STD_TORCH_CHECK(false, "megacore_cuda: ", name, " is ", torch::headeronly::toString(tensor.scalar_type()),
                            "; these kernels are for float32, bfloat16 and float16");
    }
}

inline std::int64_t itemsize(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type() &&
                        tensor.get_device_index() == like.get_device_index() && tensor.is_cpu() == like.is_cpu(),
                    "megacore_cuda: ", name, " is ", torch::headeronly::toString(tensor.scalar_type()), " on device ",
                    tensor.get_device_index(), "; it must be, as the first tensor, ",
                    torch::headeronly::toString(like.scalar_type()), " on device ", like.get_device_index());
}

inline void check_shape(const Tensor& tensor, const Tensor& like, const char* name) {
    bool same = tensor.dim() == like.dim();
    for (std::int64_t i = 0; same && i < like.dim(); ++i) same = tensor.size(i) == like.size(i);
    STD_TORCH_CHECK(same, "megacore_cuda: ", name, " must have the shape of the first tensor");
    check_like(tensor, like, name);
}

// A vector of `width` numbers, one behind the other.
inline Tensor vector_of(const Tensor& tensor, std::int64_t width, const Tensor& like, const char* name) {
    check_like(tensor, like, name);
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == width, "megacore_cuda: ", name, " has ", tensor.numel(),
                    " elements and ", tensor.dim(), " dims; it must be one row of ", width);
    return torch::stable::contiguous(tensor);
}

// Numbers of the kernels' own, such as each row's inverse.
inline const float* floats_of(const Tensor& tensor, std::int64_t count, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
                    "megacore_cuda: ", name, " must be ", count, " contiguous float32 numbers");
    return static_cast<const float*>(tensor.const_data_ptr());
}

// [..., width] as rows whose elements lie one behind the other and which are equally far apart; copied where they are
// not.
struct Rows {
    Tensor tensor;
    std::int64_t count, width, stride;

    const void* data() const { return tensor.const_data_ptr(); }
};

inline Rows rows_of(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() > 0, "megacore_cuda: ", name, " is a single number; it must have rows");
    const std::int64_t width = x.size(x.dim() - 1);
    std::int64_t count = 1, stride = 0, span = 0;
    bool even = width <= 1 || x.stride(x.dim() - 1) == 1;
    for (std::int64_t i = x.dim() - 2; i >= 0; --i) {
        const std::int64_t size = x.size(i);
        count *= size;
        if (size == 1) continue;
        if (span == 0 && stride == 0) {
            stride = x.stride(i);
            even = even && stride >= 0;
        } else {
            even = even && x.stride(i) == span;
        }
        span = x.stride(i) * size;
    }
    if (even) return {x, count, width, stride};
    return {torch::stable::contiguous(x), count, width, width};
}

// Whether everything that was named begins at multiples of 16 bytes.
class Wide {
  public:
    Wide(Dtype dtype, std::int64_t width) : size_(itemsize(dtype)) { stride(width); }

    Wide& at(const void* pointer) {
        yes_ = yes_ && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
        return *this;
    }
    Wide& stride(std::int64_t elements) {
        yes_ = yes_ && elements * size_ % 16 == 0;
        return *this;
    }
    Wide& rows(const Rows& rows) { return at(rows.data()).stride(rows.stride); }
    bool yes() const { return yes_; }

  private:
    std::int64_t size_;
    bool yes_ = true;
};

inline Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

inline Tensor floats(const Tensor& like, std::vector<std::int64_t> shape) {
    return torch::stable::new_empty(like, shape, ScalarType::Float);
}

inline float* write_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

#ifdef MEGACORE_EMULATED
struct OnDevice {
    Stream stream = nullptr;
    explicit OnDevice(const Tensor&) {}
};
#else
// The tensor's device, made the current one, and torch's current stream of it. The function that tells the stream lies
// in a library that only a torch for CUDA has, so it is looked up when first needed.
struct OnDevice {
    torch::stable::accelerator::DeviceGuard guard;
    Stream stream = nullptr;

    explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
        using Current = std::int32_t (*)(std::int32_t, void**);
        static const Current current = [] {
            void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
            return library ? reinterpret_cast<Current>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
        }();
        STD_TORCH_CHECK(current != nullptr, "megacore_cuda: this torch has no CUDA streams");
        STD_TORCH_CHECK(current(tensor.get_device_index(), &stream) == 0, "megacore_cuda: no current stream");
    }
};
#endif

}  // namespace megacore::gpu
