// Values are float32 here whatever the case's data type is: ConvData holds only numbers that the
// data type has, and the buffers that a kernel sees are made of them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "check.h"
#include "guarded.h"
#include "oracle.h"

namespace selftest {
namespace {

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// The packed weights of all nodes, one after the other.
std::vector<char> packed_weights(const ConvCase& conv, const ConvData& data, Edge edge) {
  const disco::IsaKernels& isa = disco::active_isa();
  std::vector<char> all;
  for (size_t n = 0; n < conv.nodes.size(); ++n) {
    const disco::Node& node = conv.nodes[n];
    const int64_t outputs = static_cast<int64_t>(node.out_channels.size());
    std::vector<int64_t> counts;
    for (const disco::Segment& segment : node.segments) {
      counts.push_back(static_cast<int64_t>(segment.channels.size()));
    }
    const disco::WeightShape shape = {outputs, counts, conv.geometry.taps(),
                                      conv.geometry.algorithm, conv.geometry.dtype};
    const int64_t size = disco::packed_bytes(isa, shape);
    const Guarded<float> weight = Guarded<float>::frozen(data.weights[n], edge);
    const Guarded<char> packed(static_cast<size_t>(size), edge);
    disco::pack_weights(isa, weight.data(), shape, packed.data());
    const std::vector<char> values = packed.values();
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

void encode(const std::vector<float>& values, std::vector<float>& to) { to = values; }
void encode(const std::vector<float>& values, std::vector<uint16_t>& to) {
  for (const float value : values) to.push_back(to_bfloat16(value));
}
std::vector<float> decode(std::vector<float> values) { return values; }
std::vector<float> decode(const std::vector<uint16_t>& values) {
  std::vector<float> decoded;
  for (const uint16_t value : values) decoded.push_back(from_bfloat16(value));
  return decoded;
}

template <typename Element>
Guarded<Element> guarded(const std::vector<float>& values, Edge edge, bool frozen) {
  std::vector<Element> encoded;
  encode(values, encoded);
  return frozen ? Guarded<Element>::frozen(encoded, edge) : Guarded<Element>(encoded, edge);
}

// Those of the groups, whose weights are the nodes' one after the other.
std::vector<char> packed_groups(const disco::DepthwiseConv2d& conv2d, const ConvData& data,
                                Edge edge) {
  std::vector<float> all;
  for (const std::vector<float>& weights : data.weights) {
    all.insert(all.end(), weights.begin(), weights.end());
  }
  const Guarded<float> weight = Guarded<float>::frozen(all, edge);
  const Guarded<char> packed(static_cast<size_t>(conv2d.packed_bytes()), edge);
  conv2d.pack(weight.data(), packed.data());
  return packed.values();
}

// Whether the sums can be broken off and continued.
bool sums_in_parts(const ConvCase& conv) {
  return conv.groups.count == 0 && conv.geometry.algorithm == disco::Algorithm::kDirect &&
         conv.geometry.dtype == disco::kFloat32 && conv.nodes.size() == 1 && !conv.accumulate &&
         conv.nodes[0].segments.size() > 1;
}

// The same by a call for the first segments and one for the others.
void run_in_parts(const disco::Conv2d& conv2d, const disco::Conv2dCall& call, int64_t num_first) {
  disco::Conv2dCall first = call, second = call;
  first.end_segment = num_first;
  first.residual = nullptr;
  conv2d.run(first);
  second.first_segment = num_first;
  second.accumulate = true;
  conv2d.run(second);
}

// What the output's buffer holds after one call or, with some segments first, after two.
template <typename Element>
std::vector<float> run(const ConvCase& conv, const ConvData& data, Edge edge, int32_t num_threads,
                       int64_t num_first) {
  std::vector<Guarded<Element>> sources;
  disco::Conv2dCall call = {};
  for (const Tensor& x : data.sources) {
    sources.push_back(guarded<Element>(x.values, edge, true));
    call.sources.push_back(
        {sources.back().data(), x.c, x.stride_n, x.stride_c, x.stride_h, x.stride_w});
  }
  call.batch = conv.batch;
  call.in_h = conv.in_h;
  call.in_w = conv.in_w;
  std::optional<disco::DepthwiseConv2d> grouped;
  if (conv.groups.count > 0) grouped.emplace(conv.geometry, conv.groups, conv.activation);
  const Guarded<char> packed = Guarded<char>::frozen(
      grouped ? packed_groups(*grouped, data, edge) : packed_weights(conv, data, edge), edge);
  call.packed = packed.data();
  call.packed_bytes = static_cast<int64_t>(packed.size());
  const Guarded<float> bias = Guarded<float>::frozen(data.bias, edge);
  call.bias = bias.data();
  const std::vector<float> nothing;
  const Guarded<Element> residual =
      guarded<Element>(conv.residual ? data.residual[0].values : nothing, edge, true);
  call.residual = residual.data();
  if (conv.residual) {
    call.residual_stride_n = data.residual[0].stride_n;
    call.residual_stride_h = data.residual[0].stride_h;
    call.residual_stride_w = data.residual[0].stride_w;
  }
  const Guarded<Element> out = guarded<Element>(data.out.values, edge, false);
  call.out = {out.data(), data.out.stride_n, data.out.stride_h, data.out.stride_w};
  call.out_channels = conv.out_channels;
  call.accumulate = conv.accumulate;
  call.num_threads = num_threads;

  if (grouped) {
    grouped->run(call);
    return decode(out.values());
  }
  const disco::Conv2d conv2d(conv.geometry, conv.nodes, conv.activation);
  if (num_first > 0) {
    run_in_parts(conv2d, call, num_first);
  } else {
    conv2d.run(call);
  }
  return decode(out.values());
}

std::vector<float> run(const ConvCase& conv, const ConvData& data, Edge edge, int32_t num_threads,
                       int64_t num_first = 0) {
  return conv.geometry.dtype == disco::kFloat32
             ? run<float>(conv, data, edge, num_threads, num_first)
             : run<uint16_t>(conv, data, edge, num_threads, num_first);
}

void check_same_bits(const std::vector<float>& one, const std::vector<float>& other,
                     const char* what) {
  for (size_t i = 0; i < one.size(); ++i) {
    if (!same_bits(one[i], other[i])) {
      throw CheckFailed(std::string(what) + " at element " + std::to_string(i));
    }
  }
}

std::string place(const Tensor& x, int64_t n, int64_t h, int64_t w, int64_t c) {
  return "batch " + std::to_string(n) + ", row " + std::to_string(h) + ", pixel " +
         std::to_string(w) + ", channel " + std::to_string(c) + " of " + std::to_string(x.c);
}

}  // namespace

void check_conv(const ConvCase& conv, Tally& tally) {
  const ConvData data(conv);
  const bool end_first = conv.seed % 2 == 0;
  const std::vector<float> one = run(conv, data, end_first ? Edge::kEnd : Edge::kBegin, 1);
  const std::vector<float> two = run(conv, data, end_first ? Edge::kBegin : Edge::kEnd, 2);
  tally.calls += 2;
  check_same_bits(one, two, "two threads give other bits than one");
  if (sums_in_parts(conv)) {
    const int64_t others = static_cast<int64_t>(conv.nodes[0].segments.size()) - 1;
    const int64_t num_first = 1 + conv.seed % others;
    const std::vector<float> parts = run(conv, data, Edge::kEnd, 1 + conv.seed % 2, num_first);
    check_same_bits(one, parts, "two calls for some segments each give other bits than one");
    tally.calls += 2;
    ++tally.in_parts;
  }

  std::vector<bool> owned(one.size(), false);
  for (size_t number = 0; number < conv.nodes.size(); ++number) {
    const Expected expected = expected_of(conv, data, number);
    size_t at = 0;
    for (int64_t n = 0; n < data.out.n; ++n) {
      for (int64_t h = 0; h < data.out.h; ++h) {
        for (int64_t w = 0; w < data.out.w; ++w) {
          for (const int32_t c : conv.nodes[number].out_channels) {
            const size_t i = static_cast<size_t>(data.out.index(n, h, w, c));
            owned[i] = true;
            double fraction = 0;
            const std::string wrong =
                compare(one[i], expected.value[at], expected.bound[at], fraction);
            if (!wrong.empty()) {
              throw CheckFailed("node " + std::to_string(number) + ", " +
                                place(data.out, n, h, w, c) + ": " + wrong);
            }
            tally.worst = std::max(tally.worst, fraction);
            ++tally.outputs;
            ++at;
          }
        }
      }
    }
  }
  for (size_t i = 0; i < one.size(); ++i) {
    if (!owned[i] && !same_bits(one[i], data.out.values[i])) {
      throw CheckFailed("element " + std::to_string(i) + " of the output's buffer was written, " +
                        "which is no node's");
    }
  }
}

}  // namespace selftest
