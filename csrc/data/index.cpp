// The loops of the sample index, compiled: the Python module megacore.data._native.
//
// Everything here works on numpy arrays and has a twin in megacore/data/fallback.py with the same name, arguments and
// results. Lengths may be a view into a memory-mapped .idx file, whose integers are not aligned: they are read
// through `View`, never through a plain pointer.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mersenne_twister.h"
#include "permutation.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Integers that may be unaligned in memory.
template <typename T>
class View {
  public:
    explicit View(const Array<T>& array)
        : bytes_(reinterpret_cast<const char*>(array.data())), size_(array.size()) {}

    std::int64_t operator[](std::int64_t index) const {
        T value;
        std::memcpy(&value, bytes_ + index * static_cast<std::int64_t>(sizeof(value)), sizeof(value));
        return value;
    }

    std::int64_t size() const { return size_; }

    // Asks for a length ahead of its use: shuffled look-ups otherwise wait for memory one after the other.
    void prefetch(std::int64_t index) const {
#if defined(__GNUC__) || defined(__clang__)
        __builtin_prefetch(bytes_ + index * static_cast<std::int64_t>(sizeof(T)));
#else
        (void)index;
#endif
    }

  private:
    const char* bytes_;
    std::int64_t size_;
};

using Lengths = View<std::int32_t>;

constexpr std::int64_t kAhead = 32;  // look-ups in flight; beyond a few dozen more does not help

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

megacore::Permutation permutation(std::int64_t size, const Array<std::uint64_t>& keys) {
    require(size >= 1 && size < (std::int64_t{1} << 62), "size must lie in [1, 2^62)");
    require(keys.size() >= 2 && keys.size() % 2 == 0, "keys must come in pairs");
    return megacore::Permutation(size, keys.data(), static_cast<std::size_t>(keys.size()));
}

Array<std::int64_t> permute(std::int64_t size, const Array<std::uint64_t>& keys, std::int64_t first,
                            std::int64_t count) {
    const auto shuffle = permutation(size, keys);
    require(first >= 0 && count >= 0 && first + count <= size, "first and count must lie within size");
    Array<std::int64_t> result(count);
    std::int64_t* out = result.mutable_data();
    for (std::int64_t i = 0; i < count; ++i) out[i] = shuffle(first + i);
    return result;
}

Array<std::int64_t> epoch_table(const Array<std::int32_t>& lengths_array, const Array<std::uint64_t>& keys,
                                std::int64_t stride) {
    const Lengths lengths(lengths_array);
    const auto shuffle = permutation(lengths.size(), keys);
    require(stride >= 1, "stride must be positive");
    const std::int64_t num = lengths.size();
    Array<std::int64_t> result((num + stride - 1) / stride + 1);
    std::int64_t* table = result.mutable_data();
    std::int64_t total = 0, order[kAhead];
    for (std::int64_t block = 0; block < num; block += kAhead) {
        const std::int64_t size = std::min(kAhead, num - block);
        for (std::int64_t i = 0; i < size; ++i) {
            order[i] = shuffle(block + i);
            lengths.prefetch(order[i]);
        }
        for (std::int64_t i = 0; i < size; ++i) {
            if ((block + i) % stride == 0) table[(block + i) / stride] = total;
            total += lengths[order[i]];
        }
    }
    table[result.size() - 1] = total;
    return result;
}

Array<std::int64_t> locate(const Array<std::int64_t>& table_array, const Array<std::int32_t>& lengths_array,
                           const Array<std::uint64_t>& keys, std::int64_t stride, std::int64_t start,
                           std::int64_t count) {
    const Lengths lengths(lengths_array);
    const auto shuffle = permutation(lengths.size(), keys);
    const std::int64_t* table = table_array.data();
    const std::int64_t rows = table_array.size();
    require(rows >= 2 && start >= 0 && count >= 0 && start + count <= table[rows - 1],
            "start and count must lie within the epoch");
    std::int64_t row = std::upper_bound(table, table + rows - 1, start) - table - 1;
    std::int64_t skip = start - table[row];
    std::vector<std::int64_t> pieces;
    for (std::int64_t i = row * stride; count > 0; ++i) {
        require(i < lengths.size(), "table and lengths do not belong together");
        const std::int64_t sequence = shuffle(i);
        const std::int64_t length = lengths[sequence];
        if (skip >= length) {
            skip -= length;
            continue;
        }
        const std::int64_t taken = std::min(length - skip, count);
        pieces.insert(pieces.end(), {sequence, skip, taken});
        count -= taken;
        skip = 0;
    }
    Array<std::int64_t> result({static_cast<py::ssize_t>(pieces.size() / 3), py::ssize_t{3}});
    std::copy(pieces.begin(), pieces.end(), result.mutable_data());
    return result;
}

// One pass over an .idx: the first sequence whose length is negative, the first that does not start where the one before
// ends, the first document bound that is wrong (-1: none), and a hash of all lengths and bounds.
py::tuple scan(const Array<std::int32_t>& lengths_array, const Array<std::int64_t>& offsets_array,
               const Array<std::int64_t>& bounds_array, std::int64_t itemsize) {
    const Lengths lengths(lengths_array);
    const View<std::int64_t> offsets(offsets_array), bounds(bounds_array);
    require(offsets.size() == lengths.size(), "there must be as many offsets as lengths");
    std::int64_t bad_length = -1, bad_offset = -1, bad_bound = -1, expected = 0, before = 0;
    std::uint64_t hash = 0, place = 0;
    for (std::int64_t i = 0; i < lengths.size(); ++i) {
        const std::int64_t length = lengths[i];
        if (length < 0 && bad_length < 0) bad_length = i;
        if (offsets[i] != expected && bad_offset < 0) bad_offset = i;
        expected = static_cast<std::int64_t>(static_cast<std::uint64_t>(offsets[i]) +
                                             static_cast<std::uint64_t>(length * itemsize));
        hash += megacore::mix64(static_cast<std::uint64_t>(length) + megacore::kGolden * ++place);
    }
    for (std::int64_t i = 0; i < bounds.size(); ++i) {
        const std::int64_t bound = bounds[i];
        const bool right = i == 0 ? bound == 0 : bound >= before;
        if (!right && bad_bound < 0) bad_bound = i;
        before = bound;
        hash += megacore::mix64(static_cast<std::uint64_t>(bound) + megacore::kGolden * ++place);
    }
    if (bad_bound < 0 && before != lengths.size()) bad_bound = bounds.size() - 1;
    return py::make_tuple(bad_length, bad_offset, bad_bound, hash);
}

// Shuffles in place as numpy's RandomState does, from its Mersenne Twister's state; returns the position in the state.
template <typename T>
std::int64_t shuffle(Array<T> values_array, Array<std::uint32_t> state, std::int64_t position) {
    require(state.size() == megacore::MersenneTwister::kWords, "state must hold 624 words");
    require(position >= 0 && position <= megacore::MersenneTwister::kWords, "position must lie in the state");
    require(values_array.size() <= std::numeric_limits<std::uint32_t>::max(), "at most 2^32 - 1 values");
    megacore::MersenneTwister random(state.mutable_data(), position);
    T* values = values_array.mutable_data();
    std::uint32_t chosen[kAhead];
    std::uint32_t mask = 0;
    for (std::int64_t last = values_array.size() - 1; last > 0;) {
        const std::int64_t size = std::min(kAhead, last);
        for (std::int64_t i = 0; i < size; ++i) {
            const auto most = static_cast<std::uint32_t>(last - i);
            if (mask == 0 || (mask >> 1) >= most) {  // the least 2^k - 1 that is not below `most`
                mask = most;
                for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
            }
            do {
                chosen[i] = random.next() & mask;
            } while (chosen[i] > most);
#if defined(__GNUC__) || defined(__clang__)
            __builtin_prefetch(values + chosen[i], 1);
#endif
        }
        for (std::int64_t i = 0; i < size; ++i) std::swap(values[last - i], values[chosen[i]]);
        last -= size;
    }
    return random.position();
}

// The rows of Megatron's sample index: where each sample starts, as (position in document_index, token offset).
template <typename T>
py::array fill_sample_index(const Lengths& lengths, const Array<std::int32_t>& document_index, std::int64_t seq_len,
                            std::int64_t num_samples, std::int64_t extra) {
    const std::int32_t* documents = document_index.data();
    const std::int64_t last = document_index.size() - 1;
    Array<T> result({static_cast<py::ssize_t>(num_samples + 1), py::ssize_t{2}});
    T* row = result.mutable_data();
    std::int64_t position = 0, offset = 0;
    row[0] = row[1] = 0;
    for (std::int64_t sample = 0; sample < num_samples; ++sample) {
        std::int64_t missing = seq_len + extra;
        while (true) {
            if (position + kAhead <= last) lengths.prefetch(documents[position + kAhead]);
            const std::int64_t length = lengths[documents[position]];
            const std::int64_t rest = length - offset;
            if (missing <= rest) {
                offset += missing - extra;
                break;
            }
            if (position == last) {
                offset = length - extra;
                break;
            }
            missing -= rest;
            ++position;
            offset = 0;
        }
        row += 2;
        row[0] = static_cast<T>(position);
        row[1] = static_cast<T>(offset);
    }
    return result;
}

py::array sample_index(const Array<std::int32_t>& lengths_array, const Array<std::int32_t>& document_index,
                       std::int64_t seq_len, std::int64_t num_samples, std::int64_t extra) {
    const Lengths lengths(lengths_array);
    require(document_index.size() > 0, "document_index must not be empty");
    require(seq_len >= 1 && num_samples >= 0 && extra >= 0, "seq_len, num_samples and extra must not be negative");
    for (py::ssize_t i = 0; i < document_index.size(); ++i) {
        const std::int32_t document = document_index.data()[i];
        require(document >= 0 && document < lengths.size(), "document_index points outside of lengths");
    }
    if (document_index.size() <= std::numeric_limits<std::int32_t>::max())
        return fill_sample_index<std::int32_t>(lengths, document_index, seq_len, num_samples, extra);
    return fill_sample_index<std::int64_t>(lengths, document_index, seq_len, num_samples, extra);
}

// Megatron's blend: at i take the data set that is furthest behind weight * max(i, 1), in float64, first wins ties.
py::tuple blend_megatron(const Array<double>& weights, std::int64_t size) {
    const py::ssize_t num = weights.size();
    require(num >= 1 && num <= std::numeric_limits<std::int16_t>::max(), "a blend holds 1 to 32767 data sets");
    require(size >= 0, "size must not be negative");
    Array<std::int16_t> datasets(size);
    Array<std::int64_t> samples(size);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(num), 0);
    const double* weight = weights.data();
    std::int16_t* dataset_out = datasets.mutable_data();
    std::int64_t* sample_out = samples.mutable_data();
    for (std::int64_t i = 0; i < size; ++i) {
        const double seen = std::max(static_cast<double>(i), 1.0);
        py::ssize_t best = 0;
        double most = weight[0] * seen - static_cast<double>(counts[0]);
        for (py::ssize_t d = 1; d < num; ++d) {
            const double behind = weight[d] * seen - static_cast<double>(counts[static_cast<std::size_t>(d)]);
            if (behind > most) {
                most = behind;
                best = d;
            }
        }
        dataset_out[i] = static_cast<std::int16_t>(best);
        sample_out[i] = counts[static_cast<std::size_t>(best)]++;
    }
    return py::make_tuple(datasets, samples);
}

// Our blend: integer shares that sum to the period; at i take the data set whose share of i + 1 samples is least
// served. A data set is taken only while it is behind, so after one period each has exactly its share.
py::tuple blend_pattern(const Array<std::int64_t>& shares) {
    const py::ssize_t num = shares.size();
    const std::int64_t* share = shares.data();
    std::int64_t period = 0;
    for (py::ssize_t d = 0; d < num; ++d) {
        require(share[d] >= 0, "shares must not be negative");
        period += share[d];
    }
    require(period >= 1 && period < (std::int64_t{1} << 31), "shares must sum to 1 .. 2^31 - 1");
    Array<std::int32_t> datasets(period);
    Array<std::int32_t> samples(period);
    std::vector<std::int64_t> behind(static_cast<std::size_t>(num), 0);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(num), 0);
    std::int32_t* dataset_out = datasets.mutable_data();
    std::int32_t* sample_out = samples.mutable_data();
    for (std::int64_t i = 0; i < period; ++i) {
        std::size_t best = 0;
        for (std::size_t d = 0; d < behind.size(); ++d) {
            behind[d] += share[d];
            if (behind[d] > behind[best]) best = d;
        }
        behind[best] -= period;
        dataset_out[i] = static_cast<std::int32_t>(best);
        sample_out[i] = counts[best]++;
    }
    return py::make_tuple(datasets, samples);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The loops of megacore's sample indices, compiled. Twins in numpy: megacore.data.fallback.";
    module.attr("INTERFACE") = 2;
    module.def("scan", &scan, py::arg("lengths"), py::arg("offsets"), py::arg("bounds"), py::arg("itemsize"));
    module.def("shuffle", &shuffle<std::int32_t>, py::arg("values").noconvert(), py::arg("state").noconvert(),
               py::arg("position"));
    module.def("shuffle", &shuffle<std::uint32_t>, py::arg("values").noconvert(), py::arg("state").noconvert(),
               py::arg("position"));
    module.def("permute", &permute, py::arg("size"), py::arg("keys"), py::arg("first"), py::arg("count"));
    module.def("epoch_table", &epoch_table, py::arg("lengths"), py::arg("keys"), py::arg("stride"));
    module.def("locate", &locate, py::arg("table"), py::arg("lengths"), py::arg("keys"), py::arg("stride"),
               py::arg("start"), py::arg("count"));
    module.def("sample_index", &sample_index, py::arg("lengths"), py::arg("document_index"), py::arg("seq_len"),
               py::arg("num_samples"), py::arg("extra"));
    module.def("blend_megatron", &blend_megatron, py::arg("weights"), py::arg("size"));
    module.def("blend_pattern", &blend_pattern, py::arg("shares"));
}
