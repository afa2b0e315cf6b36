// Gates of their own for each example: out = plain + gate * response + shift with shift = bias + bias gate * response
// bias, and what its gradient needs. The definitions are stn_gate_ and stn_gate_backward_ in nestopt_ext/_reference.py.
//
// A tensor is seen as slabs of channels * run elements next to each other: all that one example has at one position, if
// channels lie innermost (run is 1), or one image, if they do not. Slabs lie anywhere, at strides that count elements.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/half.h"
#include "math/platform.h"

namespace nestopt {

// By 32 bits where they suffice: a GPU has no division of 64.
NESTOPT_HD int64_t quotient(int64_t x, int64_t y) {
  return (x | y) >> 32 == 0 ? static_cast<int64_t>(static_cast<uint32_t>(x) / static_cast<uint32_t>(y)) : x / y;
}

// Dimensions from the outermost; an example has outer * middle slabs, its positions.
struct StnGateSizes {
  int64_t outer;
  int64_t examples;
  int64_t middle;
  int64_t channels;
  int64_t run;

  NESTOPT_HD int64_t positions() const { return outer * middle; }
  NESTOPT_HD int64_t slab() const { return channels * run; }
};

struct StnGateSlabs {
  const void* data = nullptr;  // null: left out
  int64_t outer_stride = 0;
  int64_t example_stride = 0;
  int64_t middle_stride = 0;

  NESTOPT_HD int64_t offset(const StnGateSizes& sizes, int64_t example, int64_t position) const {
    const int64_t outer = sizes.outer == 1 ? 0 : quotient(position, sizes.middle);
    return outer * outer_stride + example * example_stride + (position - outer * sizes.middle) * middle_stride;
  }
  template <class X>
  NESTOPT_HD const X* at(const StnGateSizes& sizes, int64_t example, int64_t position) const {
    return static_cast<const X*>(data) + offset(sizes, example, position);
  }
  template <class X>
  NESTOPT_HD X* to(const StnGateSizes& sizes, int64_t example, int64_t position) const {
    return static_cast<X*>(const_cast<void*>(data)) + offset(sizes, example, position);
  }
};

// A row of gates for each example: those of the response, then, where there is a response bias, those of it.
struct StnGateRows {
  const void* data;
  int64_t stride;

  template <class G>
  NESTOPT_HD const G* row(int64_t example) const {
    return static_cast<const G*>(data) + example * stride;
  }
};

template <class T>
NESTOPT_HD T stn_gate(T plain, T gate, T response, T shift) {
  return plain + gate * response + shift;
}

struct StnGate {
  StnGateSizes sizes;
  StnGateSlabs out;
  StnGateSlabs plain;  // null: zeros
  StnGateSlabs response;
  StnGateRows gates;
  const void* bias;           // in the math type; null: zeros
  const void* response_bias;  // likewise

  template <class T, class G>
  NESTOPT_HD T shift(int64_t example, int64_t channel) const {
    T sum = bias == nullptr ? T(0) : static_cast<const T*>(bias)[channel];
    if (response_bias != nullptr) {
      const T gate = load(gates.row<G>(example)[sizes.channels + channel]);
      sum += gate * static_cast<const T*>(response_bias)[channel];
    }
    return sum;
  }
};

// sums[example] receives, for each channel, the sum of grad * response over the positions, then, for each channel, that
// of grad. `copied` receives grad, `scaled` gate * grad. Then, where `shared` is asked for, the second half of sums is
// folded: its sum over examples, and that of its product with the bias gates, go to shared, and it becomes its product
// with the response bias.
struct StnGateBackward {
  static constexpr int64_t kPiece = 4096;  // positions

  StnGateSizes sizes;
  StnGateSlabs copied;  // null: not asked for
  StnGateSlabs scaled;  // likewise
  StnGateSlabs grad;
  StnGateSlabs response;
  StnGateRows gates;          // null if only sums are asked for
  void* sums;                 // [examples, 2 channels], in the math type
  double* partials;           // [pieces, examples, 2 channels]; null if positions are of one piece
  void* shared;               // [2, channels], in the math type; null: not asked for
  const void* response_bias;  // in the math type; null: zeros, and no product with it

  template <class G>
  NESTOPT_HD math_t<G> gate(int64_t example, int64_t channel) const {
    return gates.data == nullptr ? math_t<G>(0) : load(gates.row<G>(example)[channel]);
  }
  NESTOPT_HD int64_t pieces() const { return (sizes.positions() + kPiece - 1) / kPiece; }
  NESTOPT_HD int64_t piece_end(int64_t piece) const {
    return piece + 1 < pieces() ? (piece + 1) * kPiece : sizes.positions();
  }
  NESTOPT_HD int64_t num_sums() const { return sizes.examples * 2 * sizes.channels; }

  template <class T>
  NESTOPT_HD void keep(int64_t piece, int64_t example, int64_t channel, double products, double grads) const {
    const int64_t at = example * 2 * sizes.channels + channel;
    if (partials == nullptr) {
      static_cast<T*>(sums)[at] = static_cast<T>(products);
      static_cast<T*>(sums)[at + sizes.channels] = static_cast<T>(grads);
    } else {
      partials[piece * num_sums() + at] = products;
      partials[piece * num_sums() + at + sizes.channels] = grads;
    }
  }
  // The second half of the sums of an example, once they are there.
  template <class T>
  NESTOPT_HD T* grad_sums(int64_t example) const {
    return static_cast<T*>(sums) + (2 * example + 1) * sizes.channels;
  }
  template <class T>
  NESTOPT_HD void share(int64_t channel, double of_bias, double of_response_bias) const {
    static_cast<T*>(shared)[channel] = static_cast<T>(of_bias);
    static_cast<T*>(shared)[sizes.channels + channel] = static_cast<T>(of_response_bias);
  }
  // Once all pieces are there; i < num_sums().
  template <class T>
  NESTOPT_HD void add_partials(int64_t i) const {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces(); ++piece) sum += partials[piece * num_sums() + i];
    static_cast<T*>(sums)[i] = static_cast<T>(sum);
  }
};

}  // namespace nestopt
