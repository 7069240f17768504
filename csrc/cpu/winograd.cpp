// Winograd convolution around the micro-kernels: the tiles' pixels are transformed once for all
// nodes, every point is a 1 x 1 convolution (the gather is its offset list), and the products are
// transformed back together with the epilogue.

#include <algorithm>
#include <cstring>
#include <exception>

#include "arena.h"
#include "conv2d_plan.h"
#include "fused_pack.h"
#include "shares.h"

namespace disco {
namespace {

// Transformed pixels that are worked on at a time, per thread. They are read once for every panel
// of weights, so they should stay in a second-level cache, but every chunk reads all weights again.
constexpr int64_t kChunkBytes = 512 * 1024;
// Items of products per thread and chunk, so that one thread's delay leaves work for the others.
constexpr int64_t kItemsPerThread = 4;

constexpr int kMostPixels = 64;  // of a micro-kernel's tile

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The channels of one source that some node reads, as vectors.
struct SourceGroups {
  int64_t first;                // of this source in a row of transformed channels
  std::vector<int32_t> groups;  // first channels
};

class Winograd {
 public:
  explicit Winograd(const ConvPlan& plan)
      : plan_(plan),
        kernels_(plan.geometry.algorithm == Algorithm::kWinograd2 ? *plan.isa.winograd2
                                                                  : *plan.isa.winograd4),
        m_(kernels_.m),
        edge_(m_ + 2),
        points_(edge_ * edge_),
        pairs_(product_type(plan.geometry.algorithm, plan.geometry.dtype) == kBFloat16),
        element_bytes_(pairs_ ? 2 : 4),
        tiles_h_(divide_up(plan.out_h, m_)),
        tiles_w_(divide_up(plan.out_w, m_)),
        num_tiles_(plan.call.batch * tiles_h_ * tiles_w_),
        num_threads_(std::max(1, plan.call.num_threads)) {
    plan_rows();
    zero_bias_.assign(static_cast<size_t>(plan.panel_width()), 0.0f);
    const int64_t tile_bytes = slot_bytes_;
    const int64_t most = std::max<int64_t>(divide_up(plan.isa.max_pixels, num_threads_),
                                           kChunkBytes / std::max<int64_t>(1, tile_bytes));
    const int64_t share = divide_up(num_tiles_, num_threads_);
    num_chunks_ = divide_up(share, most);
    piece_ = num_chunks_ > 0 ? divide_up(share, num_chunks_) : 0;
    own_ranges_ = ranges_of(piece_);
  }

  void execute() {
    if (num_tiles_ == 0) return;
    transformed_ =
        static_cast<char*>(arena(ArenaSlot::kShared, num_threads_ * piece_ * slot_bytes_));
    const int64_t product_bytes =
        points_ * piece_ * plan_.panel_width() * static_cast<int64_t>(sizeof(float));
    std::exception_ptr error;
    // A thread multiplies the tiles that it has transformed: panel after panel, for each its
    // ranges.
    const int64_t panels = static_cast<int64_t>(panels_.size());
    const int64_t own = own_ranges_;
    std::vector<int64_t> first_range, first_item;
    for (int64_t t = 0; t <= num_threads_; ++t) {
      first_range.push_back(own * t);
      first_item.push_back(own * panels * t);
    }
    std::vector<Shares> transforms, multiplications;
    for (int64_t c = 0; c < num_chunks_; ++c) {
      transforms.emplace_back(first_range);
      multiplications.emplace_back(first_item);
    }
    // Each output's sum has one order whatever the chunks, items and threads are, so any schedule
    // gives the same bits.
#pragma omp parallel num_threads(num_threads_) if (num_threads_ > 1)
    {
      float* products = nullptr;
      try {
        products = static_cast<float*>(arena(ArenaSlot::kPrivate, product_bytes));
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
#pragma omp barrier
      for (int64_t c = 0; c < num_chunks_ && !error; ++c) {
        transforms[static_cast<size_t>(c)].work([&](int64_t r, int64_t) {
          const Range range = range_of(c, r);
          for (int64_t t = 0; t < range.num; ++t) transform_input(range.tile + t, range.slot + t);
        });
#pragma omp barrier
        multiplications[static_cast<size_t>(c)].work([&](int64_t i, int64_t) {
          const Panel& panel = panels_[static_cast<size_t>(i / own % panels)];
          const Range range = range_of(c, i / (own * panels) * own + i % own);
          if (range.num > 0) run_panel(panel, range, products);
        });
#pragma omp barrier
      }
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  struct Panel {
    int32_t node;
    int64_t panel;
  };

  // Where every source's channels lie in a row, and every node's offsets into it.
  void plan_rows() {
    const int64_t lanes = plan_.isa.vector_length;
    int64_t row = 0;  // elements
    for (const SourceView& source : plan_.call.sources) {
      sources_.push_back({row, {}});
      row += divide_up(source.channels, lanes) * lanes;
    }
    std::vector<char> used(static_cast<size_t>(row / lanes), 0);
    for (size_t n = 0; n < plan_.nodes.size(); ++n) {
      std::vector<int32_t> offsets;
      for (const Segment& segment : plan_.nodes[n].node->segments) {
        const int64_t first = sources_[static_cast<size_t>(segment.source)].first;
        for (const int32_t channel : segment.channels) {
          used[static_cast<size_t>((first + channel) / lanes)] = 1;
        }
        for (size_t c = 0; c < segment.channels.size(); c += pairs_ ? 2 : 1) {
          offsets.push_back(static_cast<int32_t>((first + segment.channels[c]) * element_bytes_));
        }
      }
      offsets_.push_back(std::move(offsets));
      for (int64_t p = 0; p < plan_.nodes[n].num_panels; ++p) {
        panels_.push_back({static_cast<int32_t>(n), p});
      }
    }
    for (size_t s = 0; s < sources_.size(); ++s) {
      for (int64_t c = 0; c < plan_.call.sources[s].channels; c += lanes) {
        if (used[static_cast<size_t>((sources_[s].first + c) / lanes)]) {
          sources_[s].groups.push_back(static_cast<int32_t>(c));
        }
      }
    }
    row_bytes_ = divide_up(row * element_bytes_, kCacheLineBytes) * kCacheLineBytes;
    // An odd number of cache lines: tiles a multiple of 4 KB apart would share few cache sets.
    slot_bytes_ = (points_ * row_bytes_ / kCacheLineBytes | 1) * kCacheLineBytes;
  }

  // Of one thread's piece.
  int64_t ranges_of(int64_t piece) const {
    if (num_threads_ == 1) return 1;
    const int64_t panels = std::max<int64_t>(1, static_cast<int64_t>(panels_.size()));
    const int64_t groups = divide_up(piece, plan_.isa.max_pixels);
    return std::max<int64_t>(1, std::min(groups, divide_up(kItemsPerThread, panels)));
  }

  // Tiles that lie side by side, and the slots that they have in a chunk.
  struct Range {
    int64_t tile, slot, num;
  };

  // A thread has the same part of the map in every chunk and every layer, and every chunk a piece
  // of each part.
  Range range_of(int64_t chunk, int64_t range) const {
    const int64_t thread = range / own_ranges_, r = range % own_ranges_;
    const int64_t first = num_tiles_ * thread / num_threads_;
    const int64_t share = num_tiles_ * (thread + 1) / num_threads_ - first;
    const int64_t begin = share * chunk / num_chunks_;
    const int64_t piece = share * (chunk + 1) / num_chunks_ - begin;
    const int64_t from = piece * r / own_ranges_, to = piece * (r + 1) / own_ranges_;
    return {first + begin + from, thread * piece_ + from, to - from};
  }

  void transform_input(int64_t tile, int64_t slot) const {
    const int64_t n = tile / (tiles_h_ * tiles_w_);
    const int64_t h = tile / tiles_w_ % tiles_h_ * m_ - plan_.geometry.padding_h;
    const int64_t w = tile % tiles_w_ * m_ - plan_.geometry.padding_w;
    // The part of the tile that is on the map.
    const int64_t top = std::max<int64_t>(0, -h), bottom = std::min(edge_, plan_.call.in_h - h);
    const int64_t left = std::max<int64_t>(0, -w), right = std::min(edge_, plan_.call.in_w - w);
    const char* pixels[36];
    std::fill_n(pixels, points_, plan_.zeros.data());
    for (size_t s = 0; s < sources_.size(); ++s) {
      const Map<const char>& source = plan_.sources[s];
      for (int64_t i = top; i < bottom; ++i) {
        const char* pixel = source.at(n, h + i, w + left);
        for (int64_t j = left; j < right; ++j, pixel += source.stride_w) {
          pixels[i * edge_ + j] = pixel;
        }
      }
      kernels_.input[plan_.geometry.dtype](
          {pixels, sources_[s].groups.data(), static_cast<int64_t>(sources_[s].groups.size()),
           source.channels, transformed_ + slot * slot_bytes_ + sources_[s].first * element_bytes_,
           row_bytes_});
    }
  }

  void run_panel(const Panel& item, const Range& range, float* products) const {
    const int64_t num = range.num;
    const NodePlan& plan = plan_.nodes[static_cast<size_t>(item.node)];
    const std::vector<int32_t>& offsets = offsets_[static_cast<size_t>(item.node)];
    const int64_t k = static_cast<int64_t>(offsets.size());
    const int64_t lanes = plan_.isa.vector_length;
    const int64_t outputs = static_cast<int64_t>(plan.node->out_channels.size());
    const int64_t first = item.panel * plan_.panel_width();
    const int64_t valid = std::min(plan_.panel_width(), outputs - first);
    const int64_t vectors = divide_up(valid, lanes), width = vectors * lanes;
    const char* panel = plan.panels + item.panel * plan_.panel_row_bytes() * plan.rows;
    const int64_t groups = divide_up(num, plan_.isa.max_pixels);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(float));
    const MicroKernel* kernels = pairs_ ? plan_.isa.pair_sums : plan_.isa.kernels[kFloat32];
    for (int64_t p = 0; p < points_; ++p) {
      const char* weights = panel + p * k * row_bytes;
      const char* pixel = transformed_ + range.slot * slot_bytes_ + p * row_bytes_;
      float* product = products + p * width;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t t0 = num * g / groups, mr = num * (g + 1) / groups - t0;
        const char* pixels[kMostPixels];
        char* rows[kMostPixels];
        for (int64_t t = 0; t < mr; ++t, pixel += slot_bytes_, product += points_ * width) {
          pixels[t] = pixel;
          rows[t] = reinterpret_cast<char*>(product);
        }
        const Pass pass = {pixels, offsets.data(), offsets.data() + k, 0};
        Tile tile = {};
        tile.passes = &pass;
        tile.num_passes = k > 0 ? 1 : 0;
        tile.panel = weights;
        tile.bias = zero_bias_.data();
        tile.out = rows;
        tile.touched = rows;
        tile.last_touched = rows + mr - 1;
        tile.num_channels = width;
        // The next point's weights, a part of every row with each group.
        const int64_t step = divide_up(row_bytes, groups);
        tile.prefetch = weights + (p + 1 < points_ ? k * row_bytes : 0) + g * step * k;
        tile.prefetch_step = step;
        kernels[(mr - 1) * plan_.isa.max_vectors + vectors - 1](&tile, 1);
      }
    }
    for (int64_t t = 0; t < num; ++t) {
      transform_output(plan, range.tile + t, first, valid, width, products + t * points_ * width);
    }
    if (plan_.messages != nullptr) pack(item, range.tile, range.tile + num);
  }

  // Tiles [begin, end) of a panel are complete: m_ rows of pixels for those side by side.
  void pack(const Panel& item, int64_t begin, int64_t end) const {
    while (begin < end) {
      const int64_t row = begin / tiles_w_, w = begin % tiles_w_;
      const int64_t count = std::min(tiles_w_ - w, end - begin);
      const int64_t first_h = row % tiles_h_ * m_, n = row / tiles_h_;
      for (int64_t h = first_h; h < std::min(first_h + m_, plan_.out_h); ++h) {
        const int64_t pixels = (n * plan_.out_h + h) * plan_.out_w;
        plan_.messages->write(item.node, item.panel, 1, pixels + w * m_,
                              pixels + std::min((w + count) * m_, plan_.out_w));
      }
      begin += count;
    }
  }

  void transform_output(const NodePlan& plan, int64_t tile, int64_t first, int64_t valid,
                        int64_t width, const float* products) const {
    const Conv2dCall& call = plan_.call;
    const int64_t n = tile / (tiles_h_ * tiles_w_);
    const int64_t h = tile / tiles_w_ % tiles_h_ * m_;
    const int64_t w = tile % tiles_w_ * m_;
    const int32_t* channels = plan.node->out_channels.data() + first;
    char* out[16];
    const char* residual[16];
    // Output channels that are no run: a dense copy takes their place.
    alignas(64) char dense_out[16][4 * kMostPixels], dense_residual[16][4 * kMostPixels];
    char* to[16];
    const char* added[16];
    const int64_t begin = (plan.first_out + first) * plan_.element_bytes;
    for (int64_t p = 0; p < m_ * m_; ++p) {
      const int64_t oh = h + p / m_, ow = w + p % m_;
      out[p] = to[p] = nullptr;
      added[p] = nullptr;
      if (oh >= plan_.out_h || ow >= plan_.out_w) continue;
      out[p] = plan_.out.at(n, oh, ow);
      residual[p] = call.residual != nullptr ? plan_.residual.at(n, oh, ow) : nullptr;
      if (plan.scattered) {
        to[p] = dense_out[p];
        added[p] = dense_residual[p];
        if (call.accumulate) take(channels, valid, out[p], dense_out[p]);
        if (call.residual != nullptr) take(channels, valid, residual[p], dense_residual[p]);
      } else {
        to[p] = out[p] + begin;
        if (call.residual != nullptr) added[p] = residual[p] + begin;
      }
    }
    kernels_.output[plan_.geometry.dtype]({products, width, plan.bias.data() + first, to,
                                           call.residual != nullptr ? added : nullptr, valid,
                                           call.accumulate, plan_.activation});
    for (int64_t p = 0; plan.scattered && p < m_ * m_; ++p) {
      const size_t bytes = static_cast<size_t>(plan_.element_bytes);
      for (int64_t o = 0; out[p] != nullptr && o < valid; ++o) {
        std::memcpy(out[p] + channels[o] * plan_.element_bytes,
                    dense_out[p] + o * plan_.element_bytes, bytes);
      }
    }
  }

  // Listed channels of a pixel, one after the other.
  void take(const int32_t* channels, int64_t count, const char* pixel, char* to) const {
    const size_t bytes = static_cast<size_t>(plan_.element_bytes);
    for (int64_t o = 0; o < count; ++o) {
      std::memcpy(to + o * plan_.element_bytes, pixel + channels[o] * plan_.element_bytes, bytes);
    }
  }

  const ConvPlan& plan_;
  const WinogradKernels& kernels_;
  const int64_t m_, edge_, points_;
  const bool pairs_;  // of bfloat16 are multiplied
  const int64_t element_bytes_;
  const int64_t tiles_h_, tiles_w_, num_tiles_;
  const int num_threads_;
  int64_t row_bytes_ = 0;   // of one tile's transformed channels at one point
  int64_t slot_bytes_ = 0;  // and at all points
  int64_t num_chunks_ = 0;
  int64_t piece_ = 0;       // most tiles of a chunk that are one thread's
  int64_t own_ranges_ = 1;  // that these are divided into
  std::vector<SourceGroups> sources_;
  std::vector<std::vector<int32_t>> offsets_;  // per node [K]
  std::vector<Panel> panels_;
  std::vector<float> zero_bias_;
  char* transformed_ = nullptr;  // [slot][point][row]
};

}  // namespace

void run_winograd(const ConvPlan& plan) { Winograd(plan).execute(); }

}  // namespace disco
