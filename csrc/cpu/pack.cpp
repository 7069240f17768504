// Weight layout of the micro-kernels.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>
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

// To the nearest, ties to even; a NaN stays one.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded =
      std::isnan(value) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return static_cast<uint16_t>(rounded >> 16);
}

void write(float value, float* to) { *to = value; }
void write(float value, uint16_t* to) { *to = to_bfloat16(value); }

int64_t whole_lines(int64_t bytes) {
  return (bytes + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
}

// One output channel as whole numbers from -127 to 127. With a weight that is not finite the scale
// is NaN, and so is what the channel computes.
struct Bytes {
  const float* row;
  float scale;
  int32_t sum = 0;

  Bytes(const float* row, int64_t count) : row(row) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      largest = std::max(largest, std::fabs(row[i]));
      finite &= std::isfinite(row[i]);
    }
    // Not below what has an inverse, so that nothing is divided by zero.
    scale = finite ? std::max(largest / 127.0f, FLT_MIN) : std::nanf("");
  }
  int8_t take(int64_t i) {
    if (std::isnan(scale)) return 0;
    const float value = std::nearbyint(row[i] / scale);
    const int32_t byte = static_cast<int32_t>(std::min(127.0f, std::max(-127.0f, value)));
    sum += byte;
    return static_cast<int8_t>(byte);
  }
};

// As pack_channel, in groups of four bytes.
void pack_bytes(const WeightShape& shape, Bytes& from, int64_t width, int8_t* to) {
  int64_t first = 0;
  for (const int64_t channels : shape.segment_channels) {
    for (int64_t tap = 0; tap < shape.taps; ++tap) {
      for (int64_t c = 0; c < channels; ++c) {
        to[c / 4 * width * 4 + c % 4] = from.take(first + c * shape.taps + tap);
      }
      to += (channels + 3) / 4 * width * 4;
    }
    first += channels * shape.taps;
  }
}

// One output channel: `row` [in_channels][taps] to every `width`th group of `kGroup` weights.
template <typename Element, int kGroup>
void pack_channel(const WeightShape& shape, const float* row, int64_t width, Element* to) {
  for (const int64_t channels : shape.segment_channels) {
    for (int64_t tap = 0; tap < shape.taps; ++tap) {
      for (int64_t c = 0; c < channels; ++c) {
        const float value = row[c * shape.taps + tap];
        write(without_denormals(static_cast<double>(value)),
              to + c / kGroup * width * kGroup + c % kGroup);
      }
      to += (channels + kGroup - 1) / kGroup * width * kGroup;
    }
    row += channels * shape.taps;
  }
}

// Likewise for Winograd: every group at all points, `point` elements apart.
template <typename Element, int kGroup>
void pack_points(const WeightShape& shape, const WinogradRow* rows, const float* row, int64_t width,
                 int64_t point, Element* to) {
  const int64_t edge = static_cast<int64_t>(shape.algorithm) + 2;
  for (const int64_t channels : shape.segment_channels) {
    for (int64_t c = 0; c < channels; ++c) {
      double points[36];
      winograd_weight(rows, edge, row + c * shape.taps, points);
      for (int64_t p = 0; p < edge * edge; ++p) {
        write(without_denormals(points[p]),
              to + p * point + c / kGroup * width * kGroup + c % kGroup);
      }
    }
    to += (channels + kGroup - 1) / kGroup * width * kGroup;
    row += channels * shape.taps;
  }
}

}  // namespace

int64_t WeightShape::in_channels() const {
  return std::accumulate(segment_channels.begin(), segment_channels.end(), int64_t{0});
}

int64_t WeightShape::rows() const {
  int64_t sum = 0;
  for (int64_t channels : segment_channels) sum += rows(channels);
  return sum;
}

int64_t packed_outputs(const IsaKernels& isa, const WeightShape& shape) {
  return (shape.out_channels + isa.vector_length - 1) / isa.vector_length * isa.vector_length;
}

int64_t bytes_before_panels(const IsaKernels& isa, const WeightShape& shape) {
  if (shape.product() != kInt8) return kHeaderBytes;
  const int64_t listed = packed_outputs(isa, shape) * static_cast<int64_t>(sizeof(float));
  return kHeaderBytes + whole_lines(2 * listed);
}

int64_t packed_bytes(const IsaKernels& isa, const WeightShape& shape) {
  const int64_t weights = 4 * packed_outputs(isa, shape) * shape.rows() * shape.points();
  return bytes_before_panels(isa, shape) + whole_lines(weights);
}

PackedHeader packed_header(const IsaKernels& isa, const WeightShape& shape) {
  PackedHeader header = {};
  header.magic = kPackedMagic;
  header.vector_length = isa.vector_length;
  header.max_vectors = isa.max_vectors;
  header.out_channels = static_cast<int32_t>(shape.out_channels);
  header.rows = static_cast<int32_t>(shape.rows());
  header.taps = static_cast<int32_t>(shape.taps);
  header.algorithm = static_cast<int32_t>(shape.algorithm);
  header.dtype = shape.dtype;
  return header;
}

void pack_weights(const IsaKernels& isa, const float* weight, const WeightShape& shape,
                  void* packed) {
  const bool direct = !is_winograd(shape.algorithm), pairs = shape.product() == kBFloat16;
  if (!direct && shape.taps != 9) {
    throw std::invalid_argument("Winograd is for kernels of 3 x 3, given " +
                                std::to_string(shape.taps) + " taps");
  }
  std::memset(packed, 0, static_cast<size_t>(packed_bytes(isa, shape)));
  const PackedHeader header = packed_header(isa, shape);
  std::memcpy(packed, &header, sizeof(header));

  WinogradRow rows[6];
  if (!direct) winograd_rows(static_cast<int64_t>(shape.algorithm), rows);
  const int64_t widest = isa.max_vectors * isa.vector_length;
  const int64_t in_channels = shape.in_channels();
  char* panel = static_cast<char*>(packed) + bytes_before_panels(isa, shape);
  float* scales = reinterpret_cast<float*>(static_cast<char*>(packed) + kHeaderBytes);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + packed_outputs(isa, shape));
  for (int64_t first = 0; first < shape.out_channels; first += widest) {
    const int64_t left = shape.out_channels - first;
    const int64_t valid = left < widest ? left : widest;
    const int64_t width = (valid + isa.vector_length - 1) / isa.vector_length * isa.vector_length;
    for (int64_t o = 0; o < valid; ++o) {
      const float* row = weight + (first + o) * in_channels * shape.taps;
      float* single = reinterpret_cast<float*>(panel) + o;
      uint16_t* pair = reinterpret_cast<uint16_t*>(panel) + 2 * o;
      const int64_t words = width * shape.rows();
      if (shape.product() == kInt8) {
        Bytes bytes(row, in_channels * shape.taps);
        pack_bytes(shape, bytes, width, reinterpret_cast<int8_t*>(panel) + 4 * o);
        scales[first + o] = bytes.scale;
        sums[first + o] = bytes.sum;
      } else if (direct && pairs) {
        pack_channel<uint16_t, 2>(shape, row, width, pair);
      } else if (direct) {
        pack_channel<float, 1>(shape, row, width, single);
      } else if (pairs) {
        pack_points<uint16_t, 2>(shape, rows, row, width, 2 * words, pair);
      } else {
        pack_points<float, 1>(shape, rows, row, width, words, single);
      }
    }
    panel += 4 * width * shape.rows() * shape.points();
  }
}

}  // namespace disco
