// Everything that Python sees. Tensors come as addresses, sizes and strides in elements: the
// callers (disco_kernels/backends/cpu.py) have checked dtype, device and layout.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/fma_peak.h"
#include "cpu/gather_pack.h"
#include "cpu/line_read.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
// A list of channels: first, count, int32 index. Without an index: first, first + 1, ...
using ChannelArgs = std::tuple<int32_t, int64_t, Address>;
using SegmentArgs = std::pair<int64_t, ChannelArgs>;                // source, channels
using NodeArgs = std::pair<std::vector<SegmentArgs>, ChannelArgs>;  // segments, output channels
// Address, channels, strides n, c, h, w; wire type, address of the scales, images to a row of them.
using SourceArgs =
    std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t, Address, int64_t>;
using ViewArgs = std::tuple<Address, int64_t, int64_t, int64_t>;  // strides n, h, w

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

std::vector<int32_t> channel_list(const ChannelArgs& args) {
  const auto& [first, count, index] = args;
  std::vector<int32_t> channels(static_cast<size_t>(count));
  if (index != 0) {
    std::memcpy(channels.data(), pointer<const void>(index), channels.size() * sizeof(int32_t));
  } else {
    std::iota(channels.begin(), channels.end(), first);
  }
  return channels;
}

disco::Conv2d make_conv2d(const std::array<int64_t, 8>& geometry,
                          const std::vector<NodeArgs>& nodes, int32_t activation) {
  const auto& [kh, kw, sh, sw, ph, pw, dh, dw] = geometry;
  std::vector<disco::Node> made;
  for (const NodeArgs& node : nodes) {
    disco::Node one;
    for (const SegmentArgs& segment : node.first) {
      one.segments.push_back({segment.first, channel_list(segment.second)});
    }
    one.out_channels = channel_list(node.second);
    made.push_back(std::move(one));
  }
  return disco::Conv2d({kh, kw, sh, sw, ph, pw, dh, dw}, std::move(made),
                       static_cast<disco::Activation>(activation));
}

void run_conv2d(const disco::Conv2d& conv2d, const std::vector<SourceArgs>& sources,
                const std::array<int64_t, 3>& batch_h_w, Address packed, int64_t packed_size,
                Address bias, const ViewArgs& residual, const ViewArgs& out, int64_t out_channels,
                bool accumulate, int32_t num_threads) {
  disco::Conv2dCall call = {};
  for (const auto& [data, channels, n, c, h, w, type, scale, images_per_scale] : sources) {
    const auto wire = static_cast<disco::WireType>(type);
    const bool wide = wire == disco::WireType::kFloat32;
    call.sources.push_back({wide ? pointer<const float>(data) : nullptr, channels, n, c, h, w, wire,
                            wide ? nullptr : pointer<const void>(data), pointer<const float>(scale),
                            images_per_scale});
  }
  call.batch = batch_h_w[0];
  call.in_h = batch_h_w[1];
  call.in_w = batch_h_w[2];
  call.packed = pointer<const float>(packed);
  call.packed_size = packed_size;
  call.bias = pointer<const float>(bias);
  call.residual = pointer<const float>(std::get<0>(residual));
  call.residual_stride_n = std::get<1>(residual);
  call.residual_stride_h = std::get<2>(residual);
  call.residual_stride_w = std::get<3>(residual);
  call.out = {pointer<float>(std::get<0>(out)), std::get<1>(out), std::get<2>(out),
              std::get<3>(out)};
  call.out_channels = out_channels;
  call.accumulate = accumulate;
  call.num_threads = num_threads;
  py::gil_scoped_release release;
  conv2d.run(call);
}

void pack_weights(Address weight, int64_t out_channels,
                  const std::vector<int64_t>& segment_channels, int64_t taps, Address packed) {
  py::gil_scoped_release release;
  disco::pack_weights(disco::active_isa(), pointer<const float>(weight), out_channels,
                      segment_channels, taps, pointer<float>(packed));
}

disco::GatherPack make_gather_pack(const std::vector<std::pair<Address, int64_t>>& lists) {
  std::vector<std::vector<int32_t>> made;
  for (const auto& [index, count] : lists) made.push_back(channel_list({0, count, index}));
  return disco::GatherPack(std::move(made));
}

void run_gather_pack(const disco::GatherPack& pack, Address x, int64_t channels,
                     const std::array<int64_t, 3>& n_h_w, const std::array<int64_t, 3>& strides,
                     int32_t wire, const std::vector<Address>& messages, int32_t num_threads) {
  std::vector<void*> made;
  for (const Address message : messages) made.push_back(pointer<void>(message));
  const disco::PixelGrid grid = {n_h_w[0], n_h_w[1], n_h_w[2], strides[0], strides[1], strides[2]};
  py::gil_scoped_release release;
  pack.run({pointer<const float>(x), channels, grid}, static_cast<disco::WireType>(wire), made,
           num_threads);
}

float read_lines(Address x, int64_t stride, int64_t pixels, const std::vector<int32_t>& lines,
                 int32_t num_threads) {
  py::gil_scoped_release release;
  return disco::read_lines(pointer<const float>(x), stride, pixels, lines, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of disco_kernels; use them through the package's operators.";
  m.attr("__version__") = DISCO_KERNELS_VERSION;

  m.attr("few_channels") = disco::kFewChannels;

  m.def("isa", [] { return std::string(disco::active_isa().name); });
  m.def("available_isas", &disco::available_isas);

  m.def("packed_size", [](int64_t out_channels, int64_t in_channels, int64_t taps) {
    return disco::packed_size(disco::active_isa(), out_channels, in_channels, taps);
  });
  m.def("pack_weights", &pack_weights);

  py::class_<disco::Conv2d>(m, "Conv2d")
      .def(py::init(&make_conv2d), py::arg("geometry"), py::arg("nodes"), py::arg("activation"))
      .def("packed_size", &disco::Conv2d::packed_size)
      .def("run", &run_conv2d, py::arg("sources"), py::arg("batch_h_w"), py::arg("packed"),
           py::arg("packed_size"), py::arg("bias"), py::arg("residual"), py::arg("out"),
           py::arg("out_channels"), py::arg("accumulate"), py::arg("num_threads"));

  py::class_<disco::GatherPack>(m, "GatherPack")
      .def(py::init(&make_gather_pack), py::arg("lists"))
      .def("run", &run_gather_pack, py::arg("x"), py::arg("channels"), py::arg("n_h_w"),
           py::arg("strides"), py::arg("wire"), py::arg("messages"), py::arg("num_threads"));

  m.def("read_lines", &read_lines);
  m.def("fma_peak_gflops", &disco::fma_peak_gflops, py::arg("bursts") = 20,
        py::call_guard<py::gil_scoped_release>());
}
