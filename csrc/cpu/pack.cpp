// Weight layout of the micro-kernels.

#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "conv2d.h"
#include "packed_header.h"
#include "winograd_points.h"

namespace disco {
namespace {

float without_denormals(double value) {
  return std::fabs(value) < FLT_MIN ? 0.0f : static_cast<float>(value);
}

// One row of G: the kernel's three taps as a polynomial, at one point, over the product of the
// point's distances to the others.
struct WinogradRow {
  double g[3];
};

WinogradRow at_point(double x, double distances) {
  return {{1.0 / distances, x / distances, x * x / distances}};
}

// G, [M + 2] rows, in the order of the points in winograd_body.h.
void winograd_rows(int64_t m, WinogradRow* rows) {
  const WinogradRow at_infinity = {{0.0, 0.0, 1.0}};
  if (m == 2) {
    rows[0] = at_point(0.0, 1.0);
    rows[1] = at_point(1.0, 2.0);
    rows[2] = at_point(-1.0, 2.0);
    rows[3] = at_infinity;
    return;
  }
  const double a = kWinogradA, b = kWinogradB, apart = a * a - b * b;
  rows[0] = at_point(0.0, a * a * b * b);
  rows[1] = at_point(a, 2.0 * a * a * apart);
  rows[2] = at_point(-a, 2.0 * a * a * apart);
  rows[3] = at_point(b, -2.0 * b * b * apart);
  rows[4] = at_point(-b, -2.0 * b * b * apart);
  rows[5] = at_infinity;
}

// points[p] = (G g G^T)[p], g the nine taps of one pair of channels.
void winograd_weight(const WinogradRow* rows, int64_t edge, const float* taps, double* points) {
  for (int64_t i = 0; i < edge; ++i) {
    for (int64_t j = 0; j < edge; ++j) {
      double sum = 0.0;
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t s = 0; s < 3; ++s) {
          sum += rows[i].g[r] * rows[j].g[s] * static_cast<double>(taps[r * 3 + s]);
        }
      }
      points[i * edge + j] = sum;
    }
  }
}

}  // namespace

int64_t packed_size(const IsaKernels& isa, const WeightShape& shape) {
  const int64_t vectors = (shape.out_channels + isa.vector_length - 1) / isa.vector_length;
  const int64_t size =
      kHeaderWords + vectors * isa.vector_length * shape.in_channels * shape.points();
  return (size + kHeaderWords - 1) / kHeaderWords * kHeaderWords;
}

PackedHeader packed_header(const IsaKernels& isa, const WeightShape& shape) {
  PackedHeader header = {};
  header.magic = kPackedMagic;
  header.vector_length = isa.vector_length;
  header.max_vectors = isa.max_vectors;
  header.out_channels = static_cast<int32_t>(shape.out_channels);
  header.in_channels = static_cast<int32_t>(shape.in_channels);
  header.taps = static_cast<int32_t>(shape.taps);
  header.algorithm = static_cast<int32_t>(shape.algorithm);
  return header;
}

void pack_weights(const IsaKernels& isa, const float* weight, const WeightShape& shape,
                  const std::vector<int64_t>& segment_channels, float* packed) {
  const bool direct = shape.algorithm == Algorithm::kDirect;
  if (!direct && shape.taps != 9) {
    throw std::invalid_argument("Winograd is for kernels of 3 x 3, given " +
                                std::to_string(shape.taps) + " taps");
  }
  const int64_t total = packed_size(isa, shape);
  std::memset(packed, 0, sizeof(float) * static_cast<size_t>(total));
  const PackedHeader header = packed_header(isa, shape);
  std::memcpy(packed, &header, sizeof(header));

  const int64_t m = static_cast<int64_t>(shape.algorithm), edge = m + 2;
  WinogradRow rows[6];
  if (!direct) winograd_rows(m, rows);
  const int64_t widest = isa.max_vectors * isa.vector_length;
  float* panel = packed + kHeaderWords;
  for (int64_t first = 0; first < shape.out_channels; first += widest) {
    const int64_t left = shape.out_channels - first;
    const int64_t valid = left < widest ? left : widest;
    const int64_t width = (valid + isa.vector_length - 1) / isa.vector_length * isa.vector_length;
    for (int64_t o = 0; o < valid; ++o) {
      const float* row = weight + (first + o) * shape.in_channels * shape.taps;
      float* to = panel + o;
      if (!direct) {
        for (int64_t c = 0; c < shape.in_channels; ++c) {
          double points[36];
          winograd_weight(rows, edge, row + c * shape.taps, points);
          for (int64_t p = 0; p < edge * edge; ++p) {
            to[(p * shape.in_channels + c) * width] = without_denormals(points[p]);
          }
        }
        continue;
      }
      int64_t begin = 0;
      for (int64_t channels : segment_channels) {
        for (int64_t tap = 0; tap < shape.taps; ++tap) {
          for (int64_t c = 0; c < channels; ++c) {
            *to = without_denormals(static_cast<double>(row[(begin + c) * shape.taps + tap]));
            to += width;
          }
        }
        begin += channels;
      }
    }
    panel += width * shape.in_channels * shape.points();
  }
}

}  // namespace disco
