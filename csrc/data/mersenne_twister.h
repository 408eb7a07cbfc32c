// MT19937 (Matsumoto and Nishimura, 1998) over a state that numpy holds: the generator behind numpy's RandomState.
#pragma once

#include <cstdint>

namespace megacore {

class MersenneTwister {
  public:
    static constexpr std::int64_t kWords = 624;

    MersenneTwister(std::uint32_t* state, std::int64_t position) : state_(state), position_(position) {}

    std::uint32_t next() {
        if (position_ == kWords) refill();
        std::uint32_t word = state_[position_++];
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c5680U;
        word ^= (word << 15) & 0xefc60000U;
        return word ^ (word >> 18);
    }

    std::int64_t position() const { return position_; }

  private:
    static std::uint32_t twist(std::uint32_t upper, std::uint32_t lower) {
        const std::uint32_t joined = (upper & 0x80000000U) | (lower & 0x7fffffffU);
        return (joined >> 1) ^ ((lower & 1U) != 0 ? 0x9908b0dfU : 0U);
    }

    void refill() {
        constexpr std::int64_t kShift = 397;
        for (std::int64_t i = 0; i < kWords - kShift; ++i) {
            state_[i] = state_[i + kShift] ^ twist(state_[i], state_[i + 1]);
        }
        for (std::int64_t i = kWords - kShift; i < kWords - 1; ++i) {
            state_[i] = state_[i + kShift - kWords] ^ twist(state_[i], state_[i + 1]);
        }
        state_[kWords - 1] = state_[kShift - 1] ^ twist(state_[kWords - 1], state_[0]);
        position_ = 0;
    }

    std::uint32_t* state_;
    std::int64_t position_;
};

}  // namespace megacore
