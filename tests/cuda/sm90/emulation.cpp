// The convolution for Hopper's tensor cores and its launch, on the CPU, as a library. Compiled
// beside copies of conv2d_sm90.cu, .cuh and .h, with this folder's headers for CUDA's.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/conv2d_sm90.cu"

Index threadIdx, blockIdx, gridDim;

namespace disco_sm90 {
unsigned char memory[228 * 1024];
}

namespace {

using disco_sm90::memory;
using disco_sm90::TensorMap;

// Address of the first byte: as little aligned as a program may find it.
constexpr unsigned kBegin = 1040;

constexpr size_t kStackBytes = 96 << 10;
constexpr int kProcessors = 3;
constexpr int kMostSharedBytes = 227 * 1024;

struct Product {
  bool bfloat16, keep;
  float* sums;
  int columns;
  unsigned long long a, b;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
  bool (*ready)(const void*) = nullptr;  // what it waits for, called with `state`
  const void* state = nullptr;
  unsigned block_barriers = 0, shuffles = 0;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};

struct Barrier {
  int arrivals = 0, pending = 0;
  long long bytes = 0;
  unsigned parity = 0;
};

struct Copy {
  unsigned target;
  const TensorMap* map;
  unsigned barrier;
  std::array<int, 4> at;
};

// What an encoded map says; 128 bytes are enough.
struct MapContent {
  const unsigned char* data;
  unsigned sizes[4];
  long long strides[3];  // bytes
  unsigned short box[4];
  unsigned short swizzle;
};
static_assert(sizeof(MapContent) <= sizeof(CUtensorMap));

struct Shuffle {
  unsigned generation = ~0u, arrived = 0;
  unsigned values[32];
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
unsigned current = 0, threads = 0;
std::function<void()> running;
std::vector<Barrier> barriers((kBegin + sizeof(memory)) / 8);
std::deque<Copy> copies;
std::vector<std::array<Shuffle, 2>> shuffles;
unsigned long long copies_done = 0;
unsigned random_state = 1;
int shared_bytes = 0;
std::string failure;

unsigned random_number() {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 16;
}

// Others run until `ready` says so; it is asked before every turn.
template <typename Ready>
void wait_until(const Ready& ready) {
  if (ready()) return;
  Fiber& fiber = fibers[current];
  fiber.ready = [](const void* state) { return (*static_cast<const Ready*>(state))(); };
  fiber.state = &ready;
  swapcontext(&fiber.context, &scheduler);
}

void fail(const std::string& why) {
  if (failure.empty()) failure = why;
}

Barrier& barrier_at(unsigned address) {
  if (address % 8) fail("a barrier that is not aligned");
  return barriers.at(address / 8);
}

void complete(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.parity ^= 1;
    barrier.pending = barrier.arrivals;
  }
}

unsigned swizzled(unsigned address, unsigned swizzle) {
  const unsigned mask = swizzle == disco_sm90::kSwizzle128 ? 7 : 3;
  return address ^ ((address >> 7 & mask) << 4);
}

unsigned char* shared(unsigned address, unsigned bytes) {
  if (address < kBegin || address + bytes > kBegin + unsigned(shared_bytes)) {
    fail("shared memory at " + std::to_string(address) + ", there are " +
         std::to_string(shared_bytes) + " bytes");
    return memory;
  }
  return memory + (address - kBegin);
}

void arrive(const Copy& copy) {
  const MapContent& map = *reinterpret_cast<const MapContent*>(copy.map);
  const unsigned swizzle =
      map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? disco_sm90::kSwizzle128 : disco_sm90::kSwizzle64;
  unsigned offset = 0;
  for (int i3 = 0; i3 < map.box[3]; ++i3) {
    for (int i2 = 0; i2 < map.box[2]; ++i2) {
      for (int i1 = 0; i1 < map.box[1]; ++i1) {
        for (int i0 = 0; i0 < map.box[0]; ++i0, offset += 2) {
          const std::array<long long, 4> place = {copy.at[0] + i0, copy.at[1] + i1, copy.at[2] + i2,
                                                  copy.at[3] + i3};
          bool inside = true;
          long long from = place[0] * 2;
          for (int d = 0; d < 4; ++d) {
            inside = inside && place[d] >= 0 && place[d] < map.sizes[d];
            if (d > 0) from += place[d] * map.strides[d - 1];
          }
          unsigned char* to = shared(swizzled(copy.target + offset, swizzle), 2);
          if (inside) {
            std::memcpy(to, map.data + from, 2);
          } else {
            std::memset(to, 0, 2);
          }
        }
      }
    }
  }
  ++copies_done;
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= offset;
  complete(barrier);
}

void start_copy(const Copy& copy) {
  const MapContent& map = *reinterpret_cast<const MapContent*>(copy.map);
  if (copy.target % 128) fail("a copy to a line that is not aligned");
  if (map.swizzle == CU_TENSOR_MAP_SWIZZLE_64B && copy.target % 512)
    fail("a box of 64 bytes a line");
  copies.push_back(copy);
  if (random_number() % 4 == 0) {
    arrive(copies.front());
    copies.pop_front();
  }
}

float number_at(bool bfloat16, unsigned address) {
  unsigned short bits;
  std::memcpy(&bits, shared(address, 2), 2);
  return bfloat16 ? disco_sm90::widen(disco_sm90::BFloat16{}, bits)
                  : disco_sm90::widen(disco_sm90::Float16{}, bits);
}

unsigned field(unsigned long long operand, int shift) {
  return static_cast<unsigned>(operand >> shift & 0x3FFF) << 4;
}

// B of a product, [column][16 channels]; all threads of a group read the same.
struct Columns {
  unsigned long long operand = 0, copies = ~0ull;
  int columns = 0;
  float values[128 * 16];
};

// The layouts are those of the PTX ISA's chapter on wgmma; A lies with its channels in a row, B
// with its columns.
const float* columns_of(const Product& product) {
  static std::array<Columns, 16> kept;
  static size_t next = 0;
  for (const Columns& found : kept) {
    if (found.operand == product.b && found.copies == copies_done &&
        found.columns == product.columns) {
      return found.values;
    }
  }
  Columns& made = kept[next = (next + 1) % kept.size()];
  made.operand = product.b, made.copies = copies_done, made.columns = product.columns;
  const unsigned swizzle = unsigned(product.b >> 62);
  const unsigned line = swizzle == disco_sm90::kSwizzle128 ? 128 : 64;
  for (unsigned column = 0; column < unsigned(product.columns); ++column) {
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned at = field(product.b, 0) + column * 2 / line * field(product.b, 16) +
                          k / 8 * field(product.b, 32) + k % 8 * line + column * 2 % line;
      made.values[column * 16 + k] = number_at(product.bfloat16, swizzled(at, swizzle));
    }
  }
  return made.values;
}

// What the thread holds of 64 rows x columns.
void compute(const Product& product, unsigned thread) {
  const unsigned warp = thread / 32 % 4, lane = thread % 32;
  const float* columns = columns_of(product);
  if (!product.keep) std::fill_n(product.sums, product.columns / 2, 0.0f);
  for (unsigned half = 0; half < 2; ++half) {
    const unsigned row = warp * 16 + lane / 4 + half * 8;
    float a[16];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned at =
          field(product.a, 0) + row / 8 * field(product.a, 32) + row % 8 * 128 + k * 2;
      a[k] = number_at(product.bfloat16, swizzled(at, unsigned(product.a >> 62)));
    }
    for (int eight = 0; eight < product.columns / 8; ++eight) {
      for (unsigned pair = 0; pair < 2; ++pair) {
        const float* b = columns + (unsigned(eight) * 8 + lane % 4 * 2 + pair) * 16;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
        product.sums[eight * 4 + int(half * 2 + pair)] += sum;
      }
    }
  }
}

void enter() {
  running();
  Fiber& fiber = fibers[current];
  if (!fiber.open.empty() || !fiber.committed.empty()) fail("products that nobody waited for");
  fiber.done = true;
  swapcontext(&fiber.context, &scheduler);
}

void run_block(unsigned num_threads) {
  threads = num_threads;
  if (fibers.size() < threads) fibers.resize(threads);
  shuffles.assign(threads / 32, {});
  std::fill(barriers.begin(), barriers.end(), Barrier{});
  std::memset(memory, 0xFF, sizeof(memory));  // NaN, where nothing was copied
  copies.clear();
  ++copies_done;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.done = false, fiber.ready = nullptr;
    fiber.block_barriers = fiber.shuffles = 0;
    fiber.open.clear(), fiber.committed.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0 && failure.empty();) {
    bool ran = false, passed_over = false;
    left = 0;
    // Some warps stand still for a while, and the others get ahead of them.
    unsigned still = random_number() & random_number();
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].done) continue;
      ++left;
      if (still >> t / 32 & 1) {
        passed_over = true;
        continue;
      }
      if (fibers[t].ready && !fibers[t].ready(fibers[t].state)) continue;
      fibers[t].ready = nullptr, ran = true;
      current = t, threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
    if (!copies.empty() && ((!ran && !passed_over) || random_number() % 4 == 0)) {
      // In an order of their own: nothing promises that of the orders.
      const size_t which = random_number() % copies.size();
      arrive(copies[which]);
      copies.erase(copies.begin() + long(which));
    } else if (left > 0 && !ran && !passed_over) {
      fail("threads that wait for each other");
    }
  }
  if (!copies.empty()) fail("copies that nobody waited for");
}

CUresult encode(CUtensorMap* to, CUtensorMapDataType, cuuint32_t rank, void* data,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  MapContent map{};
  map.data = static_cast<const unsigned char*>(data);
  map.swizzle = static_cast<unsigned short>(swizzle);
  const unsigned line = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 64;
  // As the driver asks for.
  if (reinterpret_cast<uintptr_t>(data) % 16 || box[0] * 2 > line) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t d = 0; d < 4; ++d) {
    map.sizes[d] = d < rank ? unsigned(sizes[d]) : 1;
    map.box[d] = d < rank ? static_cast<unsigned short>(box[d]) : 1;
    if (map.sizes[d] == 0 || map.box[d] == 0 || map.box[d] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (d < rank && steps[d] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (d + 1 < rank) {
      if (strides[d] % 16 || strides[d] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
      map.strides[d] = static_cast<long long>(strides[d]);
    }
  }
  std::memcpy(to, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

void __syncthreads() {
  Fiber& fiber = fibers[current];
  const unsigned wanted = ++fiber.block_barriers;
  wait_until([wanted] {
    return std::all_of(fibers.begin(), fibers.begin() + threads,
                       [wanted](const Fiber& other) { return other.block_barriers >= wanted; });
  });
}

unsigned __shfl_sync(unsigned, unsigned value, int lane) {
  Fiber& fiber = fibers[current];
  const unsigned self = current, generation = fiber.shuffles++;
  Shuffle& shuffle = shuffles[self / 32][generation % 2];
  if (shuffle.generation != generation) shuffle = {generation, 0, {}};
  shuffle.values[self % 32] = value;
  ++shuffle.arrived;
  wait_until([&shuffle] { return shuffle.arrived == 32; });
  return shuffle.values[lane & 31];
}

void __syncwarp() { __shfl_sync(~0u, 0, 0); }

unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lanes) {
  return __shfl_sync(mask, value, int(current % 32) ^ lanes);
}

namespace disco_sm90 {

unsigned shared_address(const void* pointer) {
  return kBegin + static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - memory);
}

void barrier_init(unsigned address, unsigned arrivals) {
  shared(address, 8);
  barrier_at(address) = {int(arrivals), int(arrivals), 0, 0};
}

void barrier_expect(unsigned address, unsigned bytes) {
  Barrier& barrier = barrier_at(address);
  barrier.bytes += bytes;
  --barrier.pending;
  complete(barrier);
}

void barrier_arrive(unsigned address) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) fail("more arrivals than a barrier waits for");
  --barrier.pending;
  complete(barrier);
}

void barrier_wait(unsigned address, unsigned parity) {
  const Barrier& barrier = barrier_at(address);
  if (barrier.arrivals == 0) fail("a barrier that was not initialised");
  wait_until([&barrier, parity] { return barrier.parity != parity; });
}

void copy_box_3d(unsigned target, const TensorMap* map, unsigned barrier, int x0, int x1, int x2) {
  start_copy({target, map, barrier, {x0, x1, x2, 0}});
}

void copy_box_4d(unsigned target, const TensorMap* map, unsigned barrier, int x0, int x1, int x2,
                 int x3) {
  start_copy({target, map, barrier, {x0, x1, x2, x3}});
}

void add_product(bool bfloat16, float* sums, int columns, unsigned long long a,
                 unsigned long long b, bool keep) {
  fibers[current].open.push_back({bfloat16, keep, sums, columns, a, b});
}

uint4 read_shared(unsigned address) {
  if (address % 16) fail("16 bytes that are not aligned");
  uint4 found;
  std::memcpy(&found, shared(address, 16), 16);
  return found;
}

void products_commit() {
  Fiber& fiber = fibers[current];
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_products(int left) {
  Fiber& fiber = fibers[current];
  while (fiber.committed.size() > size_t(left)) {
    for (const Product& product : fiber.committed.front()) compute(product, current);
    fiber.committed.pop_front();
  }
}

}  // namespace disco_sm90

const char* cudaGetErrorString(cudaError_t) { return "refused by the emulation"; }

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** address, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* answer) {
  *address = reinterpret_cast<void*>(&encode);
  *answer = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return value <= kMostSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = kProcessors, cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t bytes, cudaStream_t) {
  const auto call =
      reinterpret_cast<void (*)(disco_sm90::Conv2dArguments)>(const_cast<void*>(kernel));
  const auto& given = *static_cast<const disco_sm90::Conv2dArguments*>(arguments[0]);
  running = [&] { call(given); };
  failure.clear();
  shared_bytes = static_cast<int>(bytes);
  gridDim.x = grid.x;
  for (blockIdx.x = 0; blockIdx.x < grid.x && failure.empty(); ++blockIdx.x) run_block(block.x);
  return failure.empty() ? cudaSuccess : cudaErrorInvalidValue;
}

namespace {

thread_local std::string answer;

std::vector<disco::cuda::Conv2dNode> read_nodes(const int* words, int count) {
  std::vector<disco::cuda::Conv2dNode> nodes;
  for (int n = 0; n < count; ++n) {
    disco::cuda::Conv2dNode node{{}, words[1], words[2], words[3], words[4]};
    const int runs = words[0];
    words += 5;
    for (int r = 0; r < runs; ++r, words += 3) node.runs.push_back({words[0], words[1], words[2]});
    nodes.push_back(std::move(node));
  }
  return nodes;
}

disco::cuda::Window read_window(const int* w) { return {w[0], w[1], w[2], w[3], w[4], w[5], w[6]}; }

disco::cuda::Image read_image(const int64_t* image) {
  return {static_cast<uintptr_t>(image[0]), image[1], image[2], image[3]};
}

}  // namespace

// Nodes are: runs, columns, first output, inputs, begin of the weight; then three words a run.
extern "C" const char* disco_why_not(const int* nodes, int count, const int* window) {
  answer = disco::cuda::Conv2dSm90::refusal(read_nodes(nodes, count), read_window(window));
  return answer.c_str();
}

extern "C" const char* disco_why_not_width(const int* nodes, int count, const int* window,
                                           int width, bool one_row, int tile) {
  const disco::cuda::Conv2dSm90 conv2d(read_nodes(nodes, count), read_window(window),
                                       disco::cuda::Half::kBFloat16);
  answer = conv2d.refusal(width, one_row, tile);
  return answer.c_str();
}

extern "C" const char* disco_tiles() {
  answer.clear();
  for (const std::string& tile : disco::cuda::Conv2dSm90::tiles()) answer += tile + " ";
  return answer.c_str();
}

// The error, which begins with "value: " for an argument that is refused, or nothing.
extern "C" const char* disco_run(const int* nodes, int count, const int* window, bool bfloat16,
                                 const int64_t* x, const int* n_h_w, int64_t weight, int64_t bias,
                                 const int64_t* residual, const int64_t* out, int activation,
                                 int tile, unsigned seed) {
  random_state = seed;
  try {
    const disco::cuda::Conv2dSm90 conv2d(
        read_nodes(nodes, count), read_window(window),
        bfloat16 ? disco::cuda::Half::kBFloat16 : disco::cuda::Half::kFloat16);
    conv2d.run(read_image(x), n_h_w[0], n_h_w[1], n_h_w[2], uintptr_t(weight), uintptr_t(bias),
               read_image(residual), read_image(out), activation, 0, tile);
    answer.clear();
  } catch (const std::invalid_argument& error) {
    answer = std::string("value: ") + error.what();
  } catch (const std::exception& error) {
    answer = std::string(error.what()) + ": " + failure;
  }
  return answer.c_str();
}
