#pragma once

#include <algorithm>
#include <cstdint>

#include "math/half.h"
#include "math/stn_gate.h"

namespace nestopt::cpu {

// Work is cut by examples and blocks of channels; those whose slabs are long have few channels to a block.
struct StnGateBlocks {
  static constexpr int64_t kChannels = 1024;
  static constexpr int64_t kElements = 16384;

  int64_t channels;  // of the largest block
  int64_t count;     // for each example

  explicit StnGateBlocks(const StnGateSizes& sizes)
      : channels(std::min(sizes.channels, std::max<int64_t>(1, std::min(kChannels, kElements / sizes.run)))),
        count((sizes.channels + channels - 1) / channels) {}
};

// A unit is a block of one slab.
inline int64_t stn_gate_count(const StnGate& gate) {
  return gate.sizes.examples * StnGateBlocks(gate.sizes).count * gate.sizes.positions();
}

// A unit is a block of one example, in all slabs of a piece.
inline int64_t stn_gate_backward_count(const StnGateBackward& backward) {
  return backward.sizes.examples * StnGateBlocks(backward.sizes).count * backward.pieces();
}

// Units [first, last); data are of X, gates of G.
template <class X, class G>
void stn_gate_units(const StnGate& gate, int64_t first, int64_t last);
template <class X, class G>
void stn_gate_backward_units(const StnGateBackward& backward, int64_t first, int64_t last);

}  // namespace nestopt::cpu
