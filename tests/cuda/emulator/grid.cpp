// Runs a grid on the CPU: blocks one after another, the threads of a block as fibers.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

// Where the linker puts the variables that are __shared__, if there are any.
extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  State state;
  const char* waits_for;  // null: it does not wait
  // Of the last two exchanges: a lane may hand in its next value before the others have read the one before.
  alignas(16) unsigned char value[2][16];
  unsigned exchanges;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned current;
const std::function<void()>* body;
std::string fault;
unsigned order_seed = 0;

void stop_running(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

void enter() {
  (*body)();
  stop_running(State::kDone);
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.state = State::kReady;
  fiber.waits_for = nullptr;
  fiber.exchanges = 0;
}

// Lets [begin, end) go on if all of them wait; in one place, or it is an error.
void release_if_complete(unsigned begin, unsigned end) {
  const char* place = fibers[begin].waits_for;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waits_for == nullptr) return;
  }
  for (unsigned i = begin; i < end; ++i) {
    if (strcmp(fibers[i].waits_for, place) != 0) {
      fail((std::string("some threads wait for ") + place + ", others for " + fibers[i].waits_for).c_str());
    }
  }
  for (unsigned i = begin; i < end; ++i) {
    fibers[i].waits_for = nullptr;
    fibers[i].state = State::kReady;
  }
}

void wait(const char* place, unsigned begin, unsigned end) {
  fibers[current].waits_for = place;
  fibers[current].state = State::kWaiting;
  release_if_complete(begin, end);
  if (fibers[current].state == State::kWaiting) stop_running(State::kWaiting);
}

std::vector<unsigned> order_of_threads(unsigned block) {
  std::vector<unsigned> order(blockDim.x);
  std::iota(order.begin(), order.end(), 0u);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed + block));
  return order;
}

void run_block(unsigned block) {
  blockIdx = {block, 0, 0};
  if (__start_emulated_shared != nullptr) {
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  }
  for (unsigned i = 0; i < blockDim.x; ++i) start(fibers[i]);
  const std::vector<unsigned> order = order_of_threads(block);
  unsigned running = blockDim.x;
  while (running > 0 && fault.empty()) {
    bool progress = false;
    for (unsigned i : order) {
      if (fibers[i].state != State::kReady) continue;
      progress = true;
      current = i;
      threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
      if (!fault.empty()) return;
      running -= fibers[i].state == State::kDone;
    }
    if (progress) continue;
    unsigned waiting = 0;
    while (fibers[waiting].waits_for == nullptr) ++waiting;
    fault = "thread " + std::to_string(waiting) + " of block " + std::to_string(block) + " waits for " +
            fibers[waiting].waits_for + " and not all that it waits for come";
  }
}

}  // namespace

void fail(const char* what) {
  fault = std::string(what) + " in thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x);
  stop_running(State::kDone);
  __builtin_unreachable();
}

cudaError_t run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) return cudaErrorInvalidConfiguration;
  if (fibers.size() < threads) fibers.resize(threads);
  body = &kernel;
  fault.clear();
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  for (unsigned block = 0; block < blocks && fault.empty(); ++block) run_block(block);
  return fault.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void wait_for_block(const char* where) { wait(where, 0, blockDim.x); }

void exchange(const char* what, unsigned lanes, const void* value, size_t size) {
  if (lanes != 0xffffffffu) fail("an exchange of a part of a warp is not emulated");
  Fiber& fiber = fibers[current];
  memcpy(fiber.value[++fiber.exchanges % 2], value, size);
  const unsigned warp = threadIdx.x / kWarp * kWarp;
  wait(what, warp, warp + kWarp);
}

const void* received(unsigned lane) {
  const Fiber& fiber = fibers[threadIdx.x / kWarp * kWarp + lane];
  return fiber.value[fibers[current].exchanges % 2];
}

}  // namespace emulator

// In which order the threads of a block run: 0 ascending, 1 descending, above that at random.
extern "C" void emulator_set_order(unsigned seed) { emulator::order_seed = seed; }
extern "C" const char* emulator_fault() { return emulator::fault.c_str(); }
