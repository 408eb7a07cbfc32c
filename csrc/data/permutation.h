// A shuffle that needs no table: a keyed permutation of [0, n), evaluated one element at a time.
//
// A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) over the pairs
// (left, right) with left < a and right < b, where a*b is the smallest such rectangle that holds n. Each round adds
// to one half a hash of the other, so it can be undone and the whole is a permutation of [0, a*b). A value that lands
// at n or above is sent through again ("cycle walking") until it falls inside, which leaves a permutation of [0, n).
// megacore/data/fallback.py says the same in numpy; a test holds the two together.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace megacore {

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;  // 2^64 / golden ratio

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the input moves about half of the output.
inline std::uint64_t mix64(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

class Permutation {
  public:
    Permutation(std::int64_t size, const std::uint64_t* keys, std::size_t num_keys)
        : size_(static_cast<std::uint64_t>(size)), keys_(keys), num_keys_(num_keys) {
        num_left_ = static_cast<std::uint64_t>(std::sqrt(static_cast<double>(size_)));
        while (num_left_ * num_left_ < size_) ++num_left_;
        while (num_left_ > 1 && (num_left_ - 1) * (num_left_ - 1) >= size_) --num_left_;
        num_right_ = num_left_ == 0 ? 0 : (size_ + num_left_ - 1) / num_left_;
    }

    std::int64_t operator()(std::int64_t index) const {
        auto value = static_cast<std::uint64_t>(index);
        do {
            value = once(value);
        } while (value >= size_);
        return static_cast<std::int64_t>(value);
    }

  private:
    // The high 32 bits of a hash, scaled to [0, bound): a multiplication instead of a division.
    static std::uint64_t below(std::uint64_t hash, std::uint64_t bound) { return ((hash >> 32) * bound) >> 32; }

    static std::uint64_t add(std::uint64_t x, std::uint64_t y, std::uint64_t bound) {
        const std::uint64_t sum = x + y;
        return sum >= bound ? sum - bound : sum;
    }

    std::uint64_t once(std::uint64_t value) const {
        std::uint64_t left, right;
        if ((value | num_right_) >> 32) {
            left = value / num_right_;
            right = value % num_right_;
        } else {  // many processors divide 32 bits several times faster
            left = static_cast<std::uint32_t>(value) / static_cast<std::uint32_t>(num_right_);
            right = static_cast<std::uint32_t>(value) % static_cast<std::uint32_t>(num_right_);
        }
        for (std::size_t round = 0; round < num_keys_; round += 2) {
            left = add(left, below(mix64(right + keys_[round]), num_left_), num_left_);
            right = add(right, below(mix64(left + keys_[round + 1]), num_right_), num_right_);
        }
        return left * num_right_ + right;
    }

    std::uint64_t size_, num_left_ = 0, num_right_ = 0;
    const std::uint64_t* keys_;
    std::size_t num_keys_;
};

}  // namespace megacore
