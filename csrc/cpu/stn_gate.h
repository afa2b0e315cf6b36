#pragma once

#include <algorithm>
#include <cstdint>

#include "math/half.h"
#include "math/stn_gate.h"

namespace nestopt::cpu {

// Work is cut by examples and blocks of channels.
struct StnGateBlocks {
  static constexpr int64_t kShort = 1024;  // elements of a block of short runs
  static constexpr int64_t kLong = 16384;  // of one of long runs, or else it has one run

  bool short_runs;
  int64_t channels;  // of the largest block
  int64_t count;     // for each example

  explicit StnGateBlocks(const StnGateSizes& sizes)
      : short_runs(sizes.run <= 32),
        channels(std::min(sizes.channels,
                          short_runs ? kShort / sizes.run : std::clamp<int64_t>(kLong / sizes.run, 1, kShort))),
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

// A unit is a block of channels of all examples.
constexpr int64_t kStnGateFold = 256;
inline int64_t stn_gate_fold_count(const StnGateBackward& backward) {
  return (backward.sizes.channels + kStnGateFold - 1) / kStnGateFold;
}

// Units [first, last); data are of X, gates of G.
template <class X, class G>
void stn_gate_units(const StnGate& gate, int64_t first, int64_t last);
template <class X, class G>
void stn_gate_backward_units(const StnGateBackward& backward, int64_t first, int64_t last);
template <class X, class G>
void stn_gate_fold_units(const StnGateBackward& backward, int64_t first, int64_t last);

}  // namespace nestopt::cpu
