#include "cpu/stn_gate.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace nestopt::cpu {
namespace {

constexpr int kBlock = static_cast<int>(StnGateBlocks::kShort);
constexpr int kStrip = 64;  // positions that are added up in the type of the products
constexpr int kLanes = 16;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class X, class T>
NESTOPT_HD void gate_row(int64_t n, X* __restrict out, const X* __restrict plain, const X* __restrict response,
                         const T* __restrict gates, const T* __restrict shifts) {
  if (plain != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = store<X>(stn_gate<T>(load(plain[i]), gates[i], load(response[i]), shifts[i]));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = store<X>(stn_gate<T>(T(0), gates[i], load(response[i]), shifts[i]));
  }
}

template <class X, class T>
NESTOPT_HD void gate_run(int64_t n, X* __restrict out, const X* __restrict plain, const X* __restrict response, T gate,
                         T shift) {
  if (plain != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = store<X>(stn_gate<T>(load(plain[i]), gate, load(response[i]), shift));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = store<X>(stn_gate<T>(T(0), gate, load(response[i]), shift));
  }
}

// A number for each channel becomes one for each element of a block.
template <class T>
NESTOPT_HD void spread(int64_t channels, int64_t run, T* numbers) {
  for (int64_t c = channels - 1; run > 1 && c >= 0; --c) {
    const T number = numbers[c];
    for (int64_t s = 0; s < run; ++s) numbers[c * run + s] = number;
  }
}

template <class X, class G>
NESTOPT_SIMD void run_forward(const StnGate& gate, int64_t first, int64_t last) {
  using T = math_t<X>;
  const StnGateSizes& sizes = gate.sizes;
  const StnGateBlocks blocks(sizes);
  T gates[kBlock], shifts[kBlock];
  int64_t filled = -1;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t pair = unit / sizes.positions(), position = unit % sizes.positions();
    const int64_t example = pair / blocks.count, begin = pair % blocks.count * blocks.channels;
    const int64_t channels = std::min(sizes.channels - begin, blocks.channels);
    if (pair != filled) {
      const G* const row = gate.gates.row<G>(example) + begin;
      for (int64_t i = 0; i < channels; ++i) gates[i] = load(row[i]);
      for (int64_t i = 0; i < channels; ++i) shifts[i] = gate.shift<T, G>(example, begin + i);
      if (blocks.short_runs) {
        spread(channels, sizes.run, gates);
        spread(channels, sizes.run, shifts);
      }
      filled = pair;
    }
    X* const out = gate.out.to<X>(sizes, example, position) + begin * sizes.run;
    const X* const response = gate.response.at<X>(sizes, example, position) + begin * sizes.run;
    const X* const plain =
        gate.plain.data == nullptr ? nullptr : gate.plain.at<X>(sizes, example, position) + begin * sizes.run;
    if (blocks.short_runs) {
      gate_row<X, T>(channels * sizes.run, out, plain, response, gates, shifts);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = c * sizes.run;
      gate_run<X, T>(sizes.run, out + at, plain == nullptr ? nullptr : plain + at, response + at, gates[c], shifts[c]);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What is not asked for goes here.
template <class X>
struct Sink {
  X copied[kBlock];
  X scaled[kBlock];
};

template <class X>
NESTOPT_HD X* target(const StnGateSlabs& slabs, const StnGateSizes& sizes, int64_t example, int64_t position,
                     int64_t at, X* sink) {
  return slabs.data == nullptr ? sink : slabs.to<X>(sizes, example, position) + at;
}

template <bool kFirst, class X, class T>
NESTOPT_HD void backward_row(int64_t n, X* __restrict copied, X* __restrict scaled, const X* __restrict grad,
                             const X* __restrict response, const T* __restrict gates, T* __restrict products,
                             T* __restrict grads) {
  for (int64_t i = 0; i < n; ++i) {
    const T g = load(grad[i]);
    const T product = g * load(response[i]);
    copied[i] = grad[i];
    scaled[i] = store<X>(gates[i] * g);
    products[i] = kFirst ? product : products[i] + product;
    grads[i] = kFirst ? g : grads[i] + g;
  }
}

// Elements [at, at + n) of the slab at one position.
template <bool kFirst, class X, class T>
NESTOPT_HD void add_position(const StnGateBackward& backward, int64_t example, int64_t position, int64_t at, int64_t n,
                             const T* gates, T* products, T* grads, Sink<X>& sink) {
  const StnGateSizes& sizes = backward.sizes;
  backward_row<kFirst, X, T>(n, target<X>(backward.copied, sizes, example, position, at, sink.copied),
                             target<X>(backward.scaled, sizes, example, position, at, sink.scaled),
                             backward.grad.at<X>(sizes, example, position) + at,
                             backward.response.at<X>(sizes, example, position) + at, gates, products, grads);
}

template <class X, class T>
NESTOPT_HD void add_positions(const StnGateBackward& backward, int64_t example, int64_t first, int64_t last, int64_t at,
                              int64_t n, const T* gates, T* products, T* grads, Sink<X>& sink) {
  add_position<true, X, T>(backward, example, first, at, n, gates, products, grads, sink);
  for (int64_t position = first + 1; position < last; ++position) {
    add_position<false, X, T>(backward, example, position, at, n, gates, products, grads, sink);
  }
}

// Short runs: all elements of a block side by side, with sums for each, which the elements of a run share in the end.
template <class X, class T>
NESTOPT_HD void backward_block(const StnGateBackward& backward, int64_t example, int64_t piece, int64_t begin,
                               int64_t channels, const T* gates, Sink<X>& sink) {
  const int64_t run = backward.sizes.run, at = begin * run, n = channels * run;
  const int64_t first = piece * StnGateBackward::kPiece, last = backward.piece_end(piece);
  if (run == 1 && backward.partials == nullptr && last - first <= kStrip) {
    T* const products = static_cast<T*>(backward.sums) + example * 2 * backward.sizes.channels + begin;
    add_positions<X, T>(backward, example, first, last, at, n, gates, products, products + backward.sizes.channels,
                        sink);
    return;
  }
  T products[kBlock], grads[kBlock];
  double product_sums[kBlock], grad_sums[kBlock];
  std::fill_n(product_sums, n, 0.0);
  std::fill_n(grad_sums, n, 0.0);
  for (int64_t strip = first; strip < last; strip += kStrip) {
    add_positions<X, T>(backward, example, strip, std::min(strip + kStrip, last), at, n, gates, products, grads, sink);
    for (int64_t i = 0; i < n; ++i) {
      product_sums[i] += products[i];
      grad_sums[i] += grads[i];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    double product_sum = 0, grad_sum = 0;
    for (int64_t i = c * run; i < (c + 1) * run; ++i) {
      product_sum += product_sums[i];
      grad_sum += grad_sums[i];
    }
    backward.keep<T>(piece, example, begin + c, product_sum, grad_sum);
  }
}

// An array of the type that arithmetic is done in, in place where it is one.
template <class T, class X>
NESTOPT_HD const T* as_array(int64_t n, const X* x, T* buffer) {
  if constexpr (std::is_same_v<T, X>) {
    return x;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(x[i]);
    return buffer;
  }
}

template <class T>
NESTOPT_HD void add_up(int64_t n, const T* grad, const T* response, double& product_sum, double& grad_sum) {
  Vector<T, kLanes> products = {}, grads = {}, g, r;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    memcpy(&g, grad + i, sizeof g);
    memcpy(&r, response + i, sizeof r);
    products += g * r;
    grads += g;
  }
  for (int lane = 0; n >= kLanes && lane < kLanes; ++lane) {
    product_sum += products[lane];
    grad_sum += grads[lane];
  }
  for (; i < n; ++i) {
    product_sum += grad[i] * response[i];
    grad_sum += grad[i];
  }
}

// Long runs: channels one after another.
template <class X, class T>
NESTOPT_HD void backward_channel(const StnGateBackward& backward, int64_t example, int64_t piece, int64_t channel,
                                 T gate, Sink<X>& sink) {
  const StnGateSizes& sizes = backward.sizes;
  T grad_buffer[kBlock], response_buffer[kBlock];
  double product_sum = 0, grad_sum = 0;
  for (int64_t position = piece * StnGateBackward::kPiece; position < backward.piece_end(piece); ++position) {
    for (int64_t from = 0; from < sizes.run; from += kBlock) {
      const int64_t at = channel * sizes.run + from, n = std::min<int64_t>(sizes.run - from, kBlock);
      const X* const grad = backward.grad.at<X>(sizes, example, position) + at;
      const X* const response = backward.response.at<X>(sizes, example, position) + at;
      const T* const g = as_array<T>(n, grad, grad_buffer);
      if (backward.copied.data != nullptr) {
        memcpy(backward.copied.to<X>(sizes, example, position) + at, grad, n * sizeof(X));
      }
      X* __restrict const scaled = target<X>(backward.scaled, sizes, example, position, at, sink.scaled);
      for (int64_t i = 0; i < n; ++i) scaled[i] = store<X>(gate * g[i]);
      add_up<T>(n, g, as_array<T>(n, response, response_buffer), product_sum, grad_sum);
    }
  }
  backward.keep<T>(piece, example, channel, product_sum, grad_sum);
}

template <class X, class G>
NESTOPT_SIMD void run_backward(const StnGateBackward& backward, int64_t first, int64_t last) {
  using T = math_t<X>;
  const StnGateSizes& sizes = backward.sizes;
  const StnGateBlocks blocks(sizes);
  Sink<X> sink;
  T gates[kBlock];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t piece = unit % backward.pieces(), pair = unit / backward.pieces();
    const int64_t example = pair / blocks.count, begin = pair % blocks.count * blocks.channels;
    const int64_t channels = std::min(sizes.channels - begin, blocks.channels);
    if (backward.gates.data == nullptr) {
      std::fill_n(gates, channels, T(0));
    } else {
      const G* const row = backward.gates.row<G>(example) + begin;
      for (int64_t i = 0; i < channels; ++i) gates[i] = load(row[i]);
    }
    if (blocks.short_runs) {
      spread(channels, sizes.run, gates);
      backward_block<X, T>(backward, example, piece, begin, channels, gates, sink);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      backward_channel<X, T>(backward, example, piece, begin + c, gates[c], sink);
    }
  }
}

// ---- fold -----------------------------------------------------------------------------------------------------------

template <class T, class G>
NESTOPT_HD void fold_row(int64_t n, T* __restrict sums, const G* __restrict gates, const T* __restrict response_bias,
                         T* __restrict of_bias, T* __restrict of_response_bias) {
  for (int64_t i = 0; i < n; ++i) {
    const T sum = sums[i];
    of_bias[i] += sum;
    of_response_bias[i] += load(gates[i]) * sum;
    sums[i] = sum * response_bias[i];
  }
}

template <class X, class G>
NESTOPT_SIMD void run_fold(const StnGateBackward& backward, int64_t first, int64_t last) {
  using T = math_t<X>;
  const int64_t examples = backward.sizes.examples, channels = backward.sizes.channels;
  const T* const response_bias = static_cast<const T*>(backward.response_bias);
  for (int64_t begin = first * kStnGateFold; begin < std::min(channels, last * kStnGateFold); begin += kStnGateFold) {
    const int64_t n = std::min(channels - begin, kStnGateFold);
    T strip[2][kStnGateFold];
    double total[2][kStnGateFold] = {};
    for (int64_t e = 0; e < examples; ++e) {
      for (int half = 0; e % kStrip == 0 && half < 2; ++half) std::fill_n(strip[half], n, T(0));
      T* const sums = backward.grad_sums<T>(e) + begin;
      if (response_bias != nullptr) {
        fold_row<T, G>(n, sums, backward.gates.row<G>(e) + channels + begin, response_bias + begin, strip[0], strip[1]);
      } else {
        for (int64_t i = 0; i < n; ++i) strip[0][i] += sums[i];
      }
      if (e % kStrip == kStrip - 1 || e == examples - 1) {
        for (int half = 0; half < 2; ++half) {
          for (int64_t i = 0; i < n; ++i) total[half][i] += strip[half][i];
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) backward.share<T>(begin + i, total[0][i], total[1][i]);
  }
}

}  // namespace

// Bytes per element: read plain and response, write out; 12 in float32. Where an example has one position there are as
// many gates as elements: 20. Two multiplications and three additions at most.
template <class X, class G>
void stn_gate_units(const StnGate& gate, int64_t first, int64_t last) {
  run_forward<X, G>(gate, first, last);
}

// Bytes per element: read grad and response, write both products of the stacked gradient; 16 in float32. Where an
// example has one position there are as many gates as elements and twice as many sums: 28.
template <class X, class G>
void stn_gate_backward_units(const StnGateBackward& backward, int64_t first, int64_t last) {
  run_backward<X, G>(backward, first, last);
}

// Bytes per example and channel: read and write a sum, read a gate; 12 in float32, mostly in a cache still.
template <class X, class G>
void stn_gate_fold_units(const StnGateBackward& backward, int64_t first, int64_t last) {
  run_fold<X, G>(backward, first, last);
}

#define NESTOPT_INSTANTIATE(X, G)                                                        \
  template void stn_gate_units<X, G>(const StnGate&, int64_t, int64_t);                  \
  template void stn_gate_backward_units<X, G>(const StnGateBackward&, int64_t, int64_t); \
  template void stn_gate_fold_units<X, G>(const StnGateBackward&, int64_t, int64_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(double, double)
NESTOPT_INSTANTIATE(BFloat16, BFloat16)
NESTOPT_INSTANTIATE(BFloat16, float)
NESTOPT_INSTANTIATE(Float16, Float16)
NESTOPT_INSTANTIATE(Float16, float)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cpu
