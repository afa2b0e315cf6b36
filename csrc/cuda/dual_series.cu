#include "cuda/dual_series.cuh"

#include <algorithm>

namespace nestopt::cuda {

DualSeriesPlan plan_dual_series(const DualSeries& series, uint32_t max_blocks) {
  constexpr int64_t kWarps = kSeriesThreads / kSeriesWarp;  // of a row each
  const int64_t wanted = series.rows <= kOneBlockRows ? 1 : (series.rows + kWarps - 1) / kWarps;
  const auto blocks = static_cast<uint32_t>(std::min<int64_t>(wanted, max_blocks));
  return {blocks, series_scratch(series.rows, series.terms, blocks)};
}

// Bytes per term: gram once, rows * rows of G, and 16 a row and block for e.
template <class G, class V>
cudaError_t dual_series(const DualSeries& series, Scalar alpha, double damping, const DualSeriesPlan& plan,
                        double* scratch, cudaStream_t stream) {
  if (series.rows == 0 && series.terms == 0) return cudaSuccess;
  const SeriesArguments arguments{series, alpha, damping, scratch};
  if (plan.blocks > 1) {
    return launch_together(dual_series_kernel<G, V, true>, plan.blocks, kSeriesThreads, stream, arguments);
  }
  return launch(dual_series_kernel<G, V, false>, 1, kSeriesThreads, stream, arguments);
}

#define NESTOPT_INSTANTIATE(G, V)                                                                           \
  template cudaError_t dual_series<G, V>(const DualSeries&, Scalar, double, const DualSeriesPlan&, double*, \
                                         cudaStream_t);
NESTOPT_INSTANTIATE(float, float)
NESTOPT_INSTANTIATE(float, double)
NESTOPT_INSTANTIATE(double, float)
NESTOPT_INSTANTIATE(double, double)
#undef NESTOPT_INSTANTIATE

}  // namespace nestopt::cuda
