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
#include "cpu/depthwise.h"
#include "cpu/fma_peak.h"
#include "cpu/gather_pack.h"
#include "cpu/global_avg_pool2d.h"
#include "cpu/line_read.h"
#include "cpu/max_pool2d.h"
#ifdef DISCO_HAVE_CUDA
#include "cuda/launch.h"
#endif
#ifdef DISCO_HAVE_CUDA_SM90
#include "cuda/conv2d_sm90.h"
#endif

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

// Addresses and lengths of int32 lists.
std::vector<std::vector<int32_t>> channel_lists(
    const std::vector<std::pair<Address, int64_t>>& lists) {
  std::vector<std::vector<int32_t>> made;
  for (const auto& [index, count] : lists) made.push_back(channel_list({0, count, index}));
  return made;
}

disco::Conv2dGeometry window_of(const std::array<int64_t, 8>& geometry, int32_t dtype) {
  disco::Conv2dGeometry made = {};
  std::tie(made.kernel_h, made.kernel_w, made.stride_h, made.stride_w, made.padding_h,
           made.padding_w, made.dilation_h, made.dilation_w) = std::tuple_cat(geometry);
  made.dtype = static_cast<disco::DataType>(dtype);
  return made;
}

#ifdef DISCO_HAVE_CUDA_SM90
// first channel, channels, channels before
using RunArgs = std::tuple<int, int, int>;
// runs, columns, first output channel, input channels, begin of the weight
using CudaNodeArgs = std::tuple<std::vector<RunArgs>, int, int, int, int64_t>;
// data, strides of images, rows and pixels
using CudaImageArgs = std::tuple<Address, int64_t, int64_t, int64_t>;

std::vector<disco::cuda::Conv2dNode> cuda_nodes(const std::vector<CudaNodeArgs>& given) {
  std::vector<disco::cuda::Conv2dNode> nodes;
  for (const auto& [runs, columns, out_begin, num_inputs, weight_begin] : given) {
    std::vector<disco::cuda::Run> made;
    for (const auto& [first, count, before] : runs) made.push_back({first, count, before});
    nodes.push_back({std::move(made), columns, out_begin, num_inputs, weight_begin});
  }
  return nodes;
}

disco::cuda::Window cuda_window(const std::array<int, 7>& given) {
  return {given[0], given[1], given[2], given[3], given[4], given[5], given[6]};
}

disco::cuda::Image cuda_image(const CudaImageArgs& given) {
  return {std::get<0>(given), std::get<1>(given), std::get<2>(given), std::get<3>(given)};
}

void run_cuda_conv2d(const disco::cuda::Conv2dSm90& conv2d, const CudaImageArgs& x,
                     const std::array<int, 3>& n_h_w, Address weight, Address bias,
                     const CudaImageArgs& residual, const CudaImageArgs& out, int activation,
                     Address stream, int tile) {
  py::gil_scoped_release release;
  conv2d.run(cuda_image(x), n_h_w[0], n_h_w[1], n_h_w[2], weight, bias, cuda_image(residual),
             cuda_image(out), activation, stream, tile);
}
#endif

disco::Conv2d make_conv2d(const std::array<int64_t, 8>& geometry,
                          const std::vector<NodeArgs>& nodes, int32_t activation, int32_t algorithm,
                          int32_t dtype, const std::vector<std::pair<Address, int64_t>>& messages,
                          const std::pair<float, int32_t>& input) {
  disco::Conv2dGeometry made_geometry = window_of(geometry, dtype);
  made_geometry.algorithm = static_cast<disco::Algorithm>(algorithm);
  made_geometry.input = {input.first, input.second};
  std::vector<disco::Node> made;
  for (const NodeArgs& node : nodes) {
    disco::Node one;
    for (const SegmentArgs& segment : node.first) {
      one.segments.push_back({segment.first, channel_list(segment.second)});
    }
    one.out_channels = channel_list(node.second);
    made.push_back(std::move(one));
  }
  return disco::Conv2d(made_geometry, std::move(made), static_cast<disco::Activation>(activation),
                       channel_lists(messages));
}

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> made;
  for (const Address address : addresses) made.push_back(pointer<void>(address));
  return made;
}

disco::Conv2dCall make_call(const std::vector<SourceArgs>& sources,
                            const std::array<int64_t, 3>& batch_h_w, Address packed,
                            int64_t packed_bytes, Address bias, const ViewArgs& residual,
                            const ViewArgs& out, int64_t out_channels, bool accumulate,
                            int32_t num_threads, const std::vector<Address>& messages, int32_t wire,
                            int64_t message_images, int64_t first_segment, int64_t end_segment) {
  disco::Conv2dCall call = {};
  for (const auto& [data, channels, n, c, h, w, type, scale, images_per_scale] : sources) {
    call.sources.push_back({pointer<const void>(data), channels, n, c, h, w,
                            static_cast<disco::WireType>(type), pointer<const float>(scale),
                            images_per_scale});
  }
  call.batch = batch_h_w[0];
  call.in_h = batch_h_w[1];
  call.in_w = batch_h_w[2];
  call.packed = pointer<const void>(packed);
  call.packed_bytes = packed_bytes;
  call.bias = pointer<const float>(bias);
  call.residual = pointer<const void>(std::get<0>(residual));
  call.residual_stride_n = std::get<1>(residual);
  call.residual_stride_h = std::get<2>(residual);
  call.residual_stride_w = std::get<3>(residual);
  call.out = {pointer<void>(std::get<0>(out)), std::get<1>(out), std::get<2>(out),
              std::get<3>(out)};
  call.out_channels = out_channels;
  call.accumulate = accumulate;
  call.num_threads = num_threads;
  call.messages = pointers(messages);
  call.wire = static_cast<disco::WireType>(wire);
  call.message_images = message_images;
  call.first_segment = first_segment;
  call.end_segment = end_segment;
  return call;
}

disco::DepthwiseConv2d make_depthwise(const std::array<int64_t, 8>& geometry,
                                      const std::array<int64_t, 3>& groups, int32_t activation,
                                      int32_t dtype) {
  return disco::DepthwiseConv2d(window_of(geometry, dtype), {groups[0], groups[1], groups[2]},
                                static_cast<disco::Activation>(activation));
}

disco::WeightShape weight_shape(int64_t out_channels, const std::vector<int64_t>& segment_channels,
                                int64_t taps, int32_t algorithm, int32_t dtype) {
  return {out_channels, segment_channels, taps, static_cast<disco::Algorithm>(algorithm),
          static_cast<disco::DataType>(dtype)};
}

void pack_weights(Address weight, int64_t out_channels,
                  const std::vector<int64_t>& segment_channels, int64_t taps, int32_t algorithm,
                  int32_t dtype, Address packed) {
  py::gil_scoped_release release;
  disco::pack_weights(disco::active_isa(), pointer<const float>(weight),
                      weight_shape(out_channels, segment_channels, taps, algorithm, dtype),
                      pointer<void>(packed));
}

// Geometry as of a convolution; x and out with their sizes n, c, h, w and strides n, h, w.
void max_pool2d(const std::array<int64_t, 8>& window, int32_t dtype,
                const std::array<int64_t, 4>& size, const ViewArgs& x,
                const std::array<int64_t, 2>& out_h_w, const ViewArgs& out, int32_t num_threads) {
  disco::MaxPool2dCall call = {};
  call.window = window_of(window, dtype);
  call.x = {pointer<const void>(std::get<0>(x)),
            size[1],
            std::get<1>(x),
            1,
            std::get<2>(x),
            std::get<3>(x)};
  call.batch = size[0];
  call.in_h = size[2];
  call.in_w = size[3];
  call.out = {pointer<void>(std::get<0>(out)), std::get<1>(out), std::get<2>(out),
              std::get<3>(out)};
  call.out_h = out_h_w[0];
  call.out_w = out_h_w[1];
  call.num_threads = num_threads;
  py::gil_scoped_release release;
  disco::max_pool2d(call);
}

// x with its sizes n, c, h, w and strides n, h, w; out with its stride n.
void global_avg_pool2d(int32_t dtype, const std::array<int64_t, 4>& size, const ViewArgs& x,
                       Address out, int64_t out_stride_n, int32_t num_threads) {
  const disco::GlobalAvgPool2dCall call = {{pointer<const void>(std::get<0>(x)), size[1],
                                            std::get<1>(x), 1, std::get<2>(x), std::get<3>(x)},
                                           static_cast<disco::DataType>(dtype),
                                           size[0],
                                           size[2],
                                           size[3],
                                           pointer<void>(out),
                                           out_stride_n,
                                           num_threads};
  py::gil_scoped_release release;
  disco::global_avg_pool2d(call);
}

disco::GatherPack make_gather_pack(const std::vector<std::pair<Address, int64_t>>& lists) {
  return disco::GatherPack(channel_lists(lists));
}

void run_gather_pack(const disco::GatherPack& pack, Address x, int64_t channels,
                     const std::array<int64_t, 3>& n_h_w, const std::array<int64_t, 3>& strides,
                     int32_t dtype, int32_t wire, const std::vector<Address>& messages,
                     int32_t num_threads) {
  const std::vector<void*> made = pointers(messages);
  const disco::PixelGrid grid = {n_h_w[0], n_h_w[1], n_h_w[2], strides[0], strides[1], strides[2]};
  py::gil_scoped_release release;
  pack.run({pointer<const void>(x), channels, grid, static_cast<disco::DataType>(dtype)},
           static_cast<disco::WireType>(wire), made, num_threads);
}

float read_lines(Address x, int64_t stride, int64_t pixels, const std::vector<int32_t>& lines,
                 int32_t num_threads) {
  py::gil_scoped_release release;
  return disco::read_lines(pointer<const float>(x), stride, pixels, lines, num_threads);
}

#ifdef DISCO_HAVE_CUDA
void cuda_launch(const std::string& kernel, uint32_t blocks, Address args, size_t bytes, int device,
                 Address stream) {
  py::gil_scoped_release release;
  disco::cuda_launch(kernel, blocks, pointer<const void>(args), bytes, device,
                     pointer<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of disco_kernels; use them through the package's operators.";
  m.attr("__version__") = DISCO_KERNELS_VERSION;

  m.attr("few_channels") = disco::kFewChannels;

  m.def("isa", [] { return std::string(disco::active_isa().name); });
  m.def("available_isas", &disco::available_isas);
  m.def("has_quads", [] { return disco::active_isa().quads != nullptr; });

  m.def("packed_bytes", [](int64_t out_channels, const std::vector<int64_t>& segment_channels,
                           int64_t taps, int32_t algorithm, int32_t dtype) {
    return disco::packed_bytes(
        disco::active_isa(), weight_shape(out_channels, segment_channels, taps, algorithm, dtype));
  });
  m.def("pack_weights", &pack_weights);

  py::class_<disco::Conv2d>(m, "Conv2d")
      .def(py::init(&make_conv2d), py::arg("geometry"), py::arg("nodes"), py::arg("activation"),
           py::arg("algorithm") = 0, py::arg("dtype") = 0,
           py::arg("messages") = std::vector<std::pair<Address, int64_t>>(),
           py::arg("input_scale_and_zero_point") = std::pair<float, int32_t>(1.0f, 0))
      .def("run", &disco::Conv2d::run, py::call_guard<py::gil_scoped_release>());

  py::class_<disco::Conv2dCall>(m, "Conv2dCall")
      .def(py::init(&make_call), py::arg("sources"), py::arg("batch_h_w"), py::arg("packed"),
           py::arg("packed_bytes"), py::arg("bias"), py::arg("residual"), py::arg("out"),
           py::arg("out_channels"), py::arg("accumulate"), py::arg("num_threads"),
           py::arg("messages") = std::vector<Address>(), py::arg("wire") = 0,
           py::arg("message_images") = 0, py::arg("first_segment") = 0, py::arg("end_segment") = -1)
      .def_readwrite("num_threads", &disco::Conv2dCall::num_threads);

  py::class_<disco::BoundConv2d>(m, "BoundConv2d")
      .def(py::init<const disco::Conv2d&, disco::Conv2dCall>(), py::keep_alive<1, 2>())
      .def("run", &disco::BoundConv2d::run, py::call_guard<py::gil_scoped_release>());

  m.def("narrow_groups", [](int64_t out_channels, int32_t dtype) {
    return disco::narrow_groups(out_channels, static_cast<disco::DataType>(dtype));
  });

  py::class_<disco::DepthwiseConv2d>(m, "DepthwiseConv2d")
      .def(py::init(&make_depthwise), py::arg("geometry"), py::arg("groups_in_out"),
           py::arg("activation"), py::arg("dtype") = 0)
      .def("packed_bytes", &disco::DepthwiseConv2d::packed_bytes)
      .def("pack",
           [](const disco::DepthwiseConv2d& conv2d, Address weight, Address packed) {
             py::gil_scoped_release release;
             conv2d.pack(pointer<const float>(weight), pointer<void>(packed));
           })
      .def("run", &disco::DepthwiseConv2d::run, py::call_guard<py::gil_scoped_release>());

#ifdef DISCO_HAVE_CUDA_SM90
  py::class_<disco::cuda::Conv2dSm90>(m, "Conv2dSm90")
      .def(py::init([](const std::vector<CudaNodeArgs>& nodes, const std::array<int, 7>& window,
                       bool is_bfloat16) {
             using disco::cuda::Half;
             return disco::cuda::Conv2dSm90(cuda_nodes(nodes), cuda_window(window),
                                            is_bfloat16 ? Half::kBFloat16 : Half::kFloat16);
           }),
           py::arg("nodes"), py::arg("window"), py::arg("is_bfloat16"))
      .def_static("why_not",
                  [](const std::vector<CudaNodeArgs>& nodes, const std::array<int, 7>& window) {
                    return disco::cuda::Conv2dSm90::refusal(cuda_nodes(nodes), cuda_window(window));
                  })
      .def(
          "why_not_width",
          [](const disco::cuda::Conv2dSm90& conv2d, int width, bool one_row, int tile) {
            return conv2d.refusal(width, one_row, tile);
          },
          py::arg("width"), py::arg("one_row"), py::arg("tile"))
      .def_static("tiles", &disco::cuda::Conv2dSm90::tiles)
      .def("choose_tile", &disco::cuda::Conv2dSm90::choose_tile)
      .def("run", &run_cuda_conv2d);
#endif

  m.def("max_pool2d", &max_pool2d);
  m.def("global_avg_pool2d", &global_avg_pool2d);

  py::class_<disco::GatherPack>(m, "GatherPack")
      .def(py::init(&make_gather_pack), py::arg("lists"))
      .def("run", &run_gather_pack, py::arg("x"), py::arg("channels"), py::arg("n_h_w"),
           py::arg("strides"), py::arg("dtype"), py::arg("wire"), py::arg("messages"),
           py::arg("num_threads"));

  m.def("read_lines", &read_lines);
  // product: of enum DataType.
  m.def(
      "fma_peak_gflops",
      [](int32_t bursts, int32_t product) {
        return disco::fma_peak_gflops(bursts, static_cast<disco::DataType>(product));
      },
      py::arg("bursts") = 20, py::arg("product") = 0, py::call_guard<py::gil_scoped_release>());

#ifdef DISCO_HAVE_CUDA
  m.def("cuda_launch", &cuda_launch);
  m.def("cuda_kernels", &disco::cuda_kernels);
#endif
}
