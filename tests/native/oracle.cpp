// The bound (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sec. 3.1 and 4.2). An
// output is a sum of n = inputs * taps products, a bias, a residual and what was there before.
// Summed in float32 in any order, with or without fused multiply-add, every term goes through at
// most m = n + 4 roundings of relative size u = 2^-24. With gamma = m u / (1 - m u)
//
//   |computed - exact|  <=  gamma * (sum |w| |x|  +  |bias|  +  |residual|  +  |before|)
//
// ReLU enlarges no difference, nor does ReLU6; Hardswish has a slope of up to 1.5 and takes 3
// roundings of its own, each below a unit in the last place. A kernel may take a weight below
// FLT_MIN for zero, and a product may underflow: together at most FLT_MIN * n * (max |x| + 1). The
// inputs are exact in double precision, whose own error is 2^-29 of the bound. An activation with a
// slope above 1 or an approximation of its own needs its own factor or term here.
//
// Winograd sums A' [(G g G') * (B' d B)] A, each term with at most K + 28 roundings, and with the
// sum of |A'| [|G g G'| * (|B'| |d| |B|)] |A| in place of the other;
// tests/kernels/winograd_model.py derives it. Here |d| is at most 1, so |B'| |d| |B| is at most the
// row sums of |B'|. Bfloat16 products are exact in float32; the result is then rounded, by 2^-8 of
// it at most, and may become zero where it is below FLT_MIN. Where Winograd multiplies in bfloat16,
// both factors of a product are rounded once more, by 2^-8 each.
//
// Sums of 8-bit integers are exact. With x = (q - z) s and w = b t of whole numbers q, z, b, what
// is computed is q b summed, times s t, plus the bias less z s t times the sum of b: the sum, s t,
// the bias with its correction, their fused multiply-add and the two additions of residual and what
// was there before round, so each term at most 6 times; and the terms are those above and 2 |z s w|
// of every weight, whether its tap is inside of the map or not.

#include "oracle.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "random.h"

namespace selftest {
namespace {

constexpr double kUnitRoundoff = 0x1p-24;
constexpr double kMostInput = 1.0;  // Random::uniform()
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// F(m x m, 3 x 3) as in csrc/cpu/winograd_body.h and pack.cpp.
struct WinogradModel {
  explicit WinogradModel(disco::Algorithm algorithm) : m(static_cast<size_t>(algorithm)) {
    const double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;
    if (m == 2) {
      row_sums = {2, 2, 2, 2};
      g = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
      outputs = {{1, 1, 1, 0}, {0, 1, 1, 1}};
      return;
    }
    const double near = (1 + a) * (1 + b2), far = (1 + b) * (1 + a2);
    const double ends = a2 * b2 + a2 + b2 + 1;
    row_sums = {ends, near, near, far, far, ends};
    const double p = 2 * a2 * (a2 - b2), q = 2 * b2 * (b2 - a2);
    g = {{1 / (a2 * b2), 0, 0},  {1 / p, a / p, a2 / p},  {1 / p, -a / p, a2 / p},
         {1 / q, b / q, b2 / q}, {1 / q, -b / q, b2 / q}, {0, 0, 1}};
    outputs = {{1, 1, 1, 1, 1, 0},
               {0, a, a, b, b, 0},
               {0, a2, a2, b2, b2, 0},
               {0, a2 * a, a2 * a, b2 * b, b2 * b, 1}};
  }

  // What one channel's nine weights add to the sum, for output (i, j) of a tile.
  double scale(const float* weight, size_t i, size_t j) const {
    double sum = 0;
    for (size_t p = 0; p < m + 2; ++p) {
      for (size_t q = 0; q < m + 2; ++q) {
        double point = 0;
        for (size_t t = 0; t < 9; ++t) {
          point += g[p][t / 3] * g[q][t % 3] * static_cast<double>(weight[t]);
        }
        sum += outputs[i][p] * outputs[j][q] * row_sums[p] * row_sums[q] * std::fabs(point);
      }
    }
    return sum;
  }

  size_t m;
  std::vector<double> row_sums;              // of |B'|
  std::vector<std::vector<double>> g;        // G
  std::vector<std::vector<double>> outputs;  // |A'|
};

double activated(disco::Activation activation, double x) {
  switch (activation) {
    case disco::kActivationNone:
      return x;
    case disco::kActivationRelu:
      return x < 0 ? 0 : x;  // NaN stays, as in torch
    case disco::kActivationRelu6:
      return x < 0 ? 0 : x > 6 ? 6 : x;
    case disco::kActivationHardswish:
      return x * (x + 3 < 0 ? 0 : x + 3 > 6 ? 6 : x + 3) / 6;
    default:
      break;
  }
  throw std::logic_error("the oracle does not know this activation");
}

// One input value and where its weights are: row k of the transposed weights.
struct Read {
  const Tensor* source;
  int64_t channel, h, w;  // the tap's offset from the window's first pixel
};

std::vector<Read> reads_of(const ConvCase& conv, const ConvData& data, const disco::Node& node) {
  std::vector<Read> reads;
  for (const disco::Segment& segment : node.segments) {
    const Tensor& source = data.sources[static_cast<size_t>(segment.source)];
    for (const int32_t channel : segment.channels) {
      for (int64_t r = 0; r < conv.geometry.kernel_h; ++r) {
        for (int64_t s = 0; s < conv.geometry.kernel_w; ++s) {
          reads.push_back(
              {&source, channel, r * conv.geometry.dilation_h, s * conv.geometry.dilation_w});
        }
      }
    }
  }
  return reads;
}

// The whole number that a value is in bytes, less the zero point.
double in_steps(float value, const disco::InputBytes& input) {
  const float scaled = value * (1.0f / input.scale);
  const double byte = static_cast<double>(std::nearbyint(scaled)) + input.zero_point;
  return (byte > 255 ? 255 : byte > 0 ? byte : 0) - input.zero_point;  // a NaN is 0
}

// One output's weights as what they are in bytes.
std::vector<double> in_weight_bytes(const float* weight, size_t count) {
  float largest = 0;
  for (size_t k = 0; k < count; ++k) largest = std::max(largest, std::fabs(weight[k]));
  const float step = std::max(largest / 127.0f, FLT_MIN);
  std::vector<double> made;
  for (size_t k = 0; k < count; ++k) {
    made.push_back(static_cast<double>(std::nearbyint(weight[k] / step)) * step);
  }
  return made;
}

}  // namespace

ConvData::ConvData(const ConvCase& conv)
    : out(conv.batch, conv.out_h(), conv.out_w(), conv.out_channels, conv.out_layout) {
  Random random(conv.seed);
  for (const SourceCase& source : conv.sources) {
    sources.emplace_back(conv.batch, conv.in_h, conv.in_w, source.channels, source.layout);
  }
  // Every value is one that the data type has.
  const bool half = conv.geometry.dtype == disco::kBFloat16;
  const auto next = [&] {
    const float value = random.uniform();
    return half ? from_bfloat16(to_bfloat16(value)) : value;
  };
  const auto fill = [&](Tensor& x, const std::vector<int32_t>& channels) {
    for (int64_t n = 0; n < x.n; ++n) {
      for (int64_t h = 0; h < x.h; ++h) {
        for (int64_t w = 0; w < x.w; ++w) {
          for (const int32_t c : channels) x.at(n, h, w, c) = next();
        }
      }
    }
  };
  if (conv.residual) residual.emplace_back(out.n, out.h, out.w, out.c, conv.residual_layout);
  for (const disco::Node& node : conv.nodes) {
    for (const disco::Segment& segment : node.segments) {
      Tensor& source = sources[static_cast<size_t>(segment.source)];
      fill(source, segment.channels);
      if (!conv.special || source.values.empty() || segment.channels.empty()) continue;
      for (const float value : {std::nanf(""), kInfinity, -kInfinity}) {
        const auto any = [&](int64_t n) { return static_cast<int64_t>(random.below(n)); };
        const int32_t channel = segment.channels[random.below(segment.channels.size())];
        const int64_t n = any(source.n), h = any(source.h), w = any(source.w);
        source.at(n, h, w, channel) = value;
      }
    }
    weights.push_back(
        random.uniform(node.out_channels.size() * static_cast<size_t>(node.num_in_channels()) *
                       static_cast<size_t>(conv.geometry.taps())));
    if (half) {
      for (float& value : weights.back()) value = from_bfloat16(to_bfloat16(value));
    }
    if (conv.residual) fill(residual[0], node.out_channels);
    if (conv.accumulate) fill(out, node.out_channels);
  }
  if (conv.bias) bias = random.uniform(static_cast<size_t>(conv.out_channels));
}

Expected expected_of(const ConvCase& conv, const ConvData& data, size_t number) {
  const disco::Node& node = conv.nodes[number];
  const std::vector<Read> reads = reads_of(conv, data, node);
  const size_t outputs = node.out_channels.size();
  // Transposed: the inner loop then goes over outputs, which a compiler can vectorise.
  std::vector<double> weight(reads.size() * outputs);
  const bool bytes = conv.geometry.algorithm == disco::Algorithm::kQuads;
  const double step = bytes ? static_cast<double>(conv.geometry.input.scale) : 0;
  // Per output: terms that do not depend on the pixel.
  std::vector<double> corrections(outputs);
  for (size_t o = 0; o < outputs; ++o) {
    const float* row = data.weights[number].data() + o * reads.size();
    const std::vector<double> values =
        bytes ? in_weight_bytes(row, reads.size()) : std::vector<double>(row, row + reads.size());
    for (size_t k = 0; k < reads.size(); ++k) {
      weight[k * outputs + o] = values[k];
      corrections[o] += 2 * conv.geometry.input.zero_point * step * std::fabs(values[k]);
    }
  }
  const double terms = static_cast<double>(reads.size());
  const bool direct = !disco::is_winograd(conv.geometry.algorithm);
  const double channels = static_cast<double>(node.num_in_channels());
  // Per place in a tile and output.
  std::vector<double> winograd;
  const size_t m = direct ? 0 : static_cast<size_t>(conv.geometry.algorithm);
  if (!direct) {
    const WinogradModel model(conv.geometry.algorithm);
    const float* weights = data.weights[number].data();
    for (size_t place = 0; place < m * m; ++place) {
      for (size_t o = 0; o < outputs; ++o) {
        double sum = 0;
        for (size_t k = 0; k < reads.size(); k += 9) {
          sum += model.scale(weights + o * reads.size() + k, place / m, place % m);
        }
        winograd.push_back(sum);
      }
    }
  }
  const double most = bytes ? 6 : direct ? terms + 4 : channels + 28;
  const double roundings = most * kUnitRoundoff;
  const double gamma = roundings / (1 - roundings);
  const bool pairs = !direct && disco::product_type(conv.geometry.algorithm, conv.geometry.dtype) ==
                                    disco::kBFloat16;
  const double operands = pairs ? (1 + 0x1p-8) * (1 + 0x1p-8) - 1 : 0;
  const double underflow =
      static_cast<double>(FLT_MIN) * terms * (kMostInput + 1) * (direct ? 1 : 1e5);
  Expected expected;
  std::vector<double> value(outputs), scale(outputs);
  for (int64_t n = 0; n < data.out.n; ++n) {
    for (int64_t oh = 0; oh < data.out.h; ++oh) {
      for (int64_t ow = 0; ow < data.out.w; ++ow) {
        for (size_t o = 0; o < outputs; ++o) {
          const int64_t channel = node.out_channels[o];
          value[o] = 0;
          scale[o] = corrections[o];
          const auto add = [&](double x) {
            value[o] += x;
            scale[o] += std::fabs(x);
          };
          if (conv.accumulate) {
            add(data.out.at(n, oh, ow, channel));  // the first pass added the bias
          } else if (conv.bias) {
            add(data.bias[static_cast<size_t>(channel)]);
          }
          if (conv.residual) add(data.residual[0].at(n, oh, ow, channel));
        }
        for (size_t k = 0; k < reads.size(); ++k) {
          const Read& read = reads[k];
          const int64_t h = oh * conv.geometry.stride_h - conv.geometry.padding_h + read.h;
          const int64_t w = ow * conv.geometry.stride_w - conv.geometry.padding_w + read.w;
          if (h < 0 || h >= conv.in_h || w < 0 || w >= conv.in_w) continue;
          const float given = read.source->at(n, h, w, read.channel);
          const double x =
              bytes ? in_steps(given, conv.geometry.input) * step : static_cast<double>(given);
          const double* row = weight.data() + k * outputs;
          for (size_t o = 0; o < outputs; ++o) {
            value[o] += x * row[o];
            scale[o] += std::fabs(x) * std::fabs(row[o]);
          }
        }
        for (size_t o = 0; o < outputs; ++o) {
          const double result = activated(conv.activation, value[o]);
          double sum = scale[o], products = 0;
          if (!direct) {
            const size_t place = static_cast<size_t>(oh) % m * m + static_cast<size_t>(ow) % m;
            products = winograd[place * outputs + o];
            sum += products;
          }
          double bound = gamma * sum + (1 + gamma) * operands * products + underflow;
          if (conv.activation == disco::kActivationHardswish) {
            bound = 1.5 * bound + 3 * 2 * kUnitRoundoff * std::fabs(result);
          }
          if (conv.geometry.dtype == disco::kBFloat16) {
            bound += 0x1p-8 * (std::fabs(result) + bound) + static_cast<double>(FLT_MIN);
          }
          expected.value.push_back(result);
          expected.bound.push_back(bound);
        }
      }
    }
  }
  return expected;
}

std::string compare(float actual, double value, double bound, double& fraction) {
  fraction = 0;
  if (std::isfinite(value)) {
    const double error = std::fabs(static_cast<double>(actual) - value);
    if (bound > 0) fraction = error / bound;
    if (error <= bound) return "";  // not so for NaN
  } else if (std::isnan(value) ? std::isnan(actual) : actual == value) {
    return "";
  }
  std::ostringstream text;
  text.precision(9);
  text << actual << ", exact " << value << ", allowed difference " << bound;
  return text.str();
}

}  // namespace selftest
