#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SANITIZER(call) call
#else
#define SANITIZER(call) static_cast<void>(0)
#endif

#if defined(__x86_64__)
asm(R"(
    .text
    .hidden emulation_switch
    .globl emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, . - emulation_switch
)");
#endif

namespace emulation {

Position here;
thread_local int device = 0;
uint64_t launches[kDevices] = {};

extern "C" {
__attribute__((visibility("default"))) int emulation_device() {
    return device;
}
__attribute__((visibility("default"))) uint64_t emulation_launches(int number) {
    return launches[number];
}
}

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kPoison = 0xff;  // NaN in every float format

struct Copy {
    char* to;
    const char* from;
    size_t bytes, zeros;
};

struct Fiber {
    Context context;
    char* stack = nullptr;
    void* fake_stack = nullptr;
    Position place;
    unsigned number = 0, warp = 0, exchanges = 0, votes = 0;
    uint64_t priority = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
};

struct Warp {
    uint64_t values[2][kWarp];  // the lanes of one exchange read while the fastest are at the next
    std::vector<Fiber*> waiting;
    int line = 0;
};

// Who runs next. Fixed priorities starve the last warp or thread for as long as the others can go on.
enum class Order { kAnyone, kWarps, kThreads };

struct Block {
    std::vector<Fiber*> ready;  // a heap by priority
    std::vector<Fiber*> waiting;
    Order order = Order::kAnyone;
    std::vector<Warp> warps;
    int line = 0;
    bool any = false, said[2] = {};  // of barrier_or; the fastest threads come to the next one before all have read
    unsigned threads = 0, left = 0;
    std::map<int, std::unique_ptr<char[]>> shared;
    std::unique_ptr<char[]> dynamic;
    std::string failure;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::mt19937_64 random;
    Context scheduler;
    void* fake_stack = nullptr;
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    Fiber* current = nullptr;
    Block* block = nullptr;
    const std::function<void()>* body = nullptr;
    std::string skip;
};
Machine machine;

bool later(const Fiber* a, const Fiber* b) {
    return a->priority < b->priority;
}

// Makes fibers ready to run; leaves `fibers` empty.
void release(Block& block, std::vector<Fiber*>& fibers) {
    for (Fiber* fiber : fibers) {
        if (block.order == Order::kAnyone) fiber->priority = machine.random();
        block.ready.push_back(fiber);
        std::push_heap(block.ready.begin(), block.ready.end(), later);
    }
    fibers.clear();
}

// From the fiber to the scheduler; comes back when the fiber is chosen again, or never if it has ended.
void leave(bool ended) {
    Fiber* self = machine.current;
    SANITIZER(__sanitizer_start_switch_fiber(ended ? nullptr : &self->fake_stack, machine.stack, machine.stack_bytes));
    static_cast<void>(ended);
    self->context.enter(machine.scheduler);
    SANITIZER(__sanitizer_finish_switch_fiber(self->fake_stack, &machine.stack, &machine.stack_bytes));
}

[[noreturn]] void fail(const std::string& what) {
    const Position& at = here;
    machine.block->failure = "block (" + std::to_string(at.block.x) + ", " + std::to_string(at.block.y) + ") thread " +
                             std::to_string(at.thread.x) + ": " + what;
    leave(true);
    std::abort();
}

// Whether the barrier or wait of this line is to be left out.
bool skipped(const char* file, int line) {
    if (machine.skip.empty()) return false;
    const std::string place = std::string(file) + ":" + std::to_string(line);
    return place.size() > machine.skip.size() &&
           place.compare(place.size() - machine.skip.size() - 1, std::string::npos, "/" + machine.skip) == 0;
}

void enter() {
    SANITIZER(__sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_bytes));
    (*machine.body)();
    Block& block = *machine.block;
    ++block.left;
    for (const auto& group : machine.current->committed) {
        if (!group.empty() && machine.skip.empty()) fail("left the kernel with an asynchronous copy under way");
    }
    leave(true);
}

void resume(Fiber* fiber) {
    machine.current = fiber;
    here = fiber->place;
    SANITIZER(__sanitizer_start_switch_fiber(&machine.fake_stack, fiber->stack, kStack));
    machine.scheduler.enter(fiber->context);
    SANITIZER(__sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr));
}

Fiber* prepared(unsigned number, const Position& place) {
    while (machine.fibers.size() <= number) machine.fibers.push_back(std::make_unique<Fiber>());
    Fiber* fiber = machine.fibers[number].get();
    if (!fiber->stack) {
        void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
        fiber->stack = static_cast<char*>(memory);
    }
    SANITIZER(__asan_unpoison_memory_region(fiber->stack, kStack));
    fiber->fake_stack = nullptr;
    fiber->place = place;
    fiber->number = number;
    fiber->warp = number / kWarp;
    fiber->exchanges = fiber->votes = 0;
    fiber->open.clear();
    fiber->committed.clear();
    fiber->context.prepare(fiber->stack, kStack, enter);
    return fiber;
}

std::unique_ptr<char[]> poisoned(size_t bytes) {
    std::unique_ptr<char[]> memory(new char[bytes]);
    memset(memory.get(), kPoison, bytes);
    return memory;
}

void run_block(Position place, size_t dynamic_bytes) {
    Block block;
    machine.block = &block;
    block.threads = place.threads.x;
    block.warps.resize((block.threads + kWarp - 1) / kWarp);
    block.dynamic = poisoned(dynamic_bytes);
    block.order = static_cast<Order>(machine.random() % 3);
    std::vector<uint64_t> warps(block.warps.size());
    for (uint64_t& priority : warps) priority = machine.random();
    std::vector<Fiber*> fibers;
    for (unsigned number = 0; number < block.threads; ++number) {
        place.thread = dim3(number, 0, 0);
        fibers.push_back(prepared(number, place));
        fibers.back()->priority = block.order == Order::kWarps ? warps[number / kWarp] : machine.random();
    }
    release(block, fibers);
    while (!block.ready.empty()) {
        std::pop_heap(block.ready.begin(), block.ready.end(), later);
        Fiber* next = block.ready.back();
        block.ready.pop_back();
        resume(next);
        if (!block.failure.empty()) throw std::runtime_error(block.failure);
    }
    if (block.left != block.threads) {
        throw std::runtime_error("block (" + std::to_string(place.block.x) + "): " +
                                 std::to_string(block.threads - block.left) + " threads wait for others for ever");
    }
}

}  // namespace

void run(dim3 blocks, dim3 threads, size_t dynamic_bytes, const std::function<void()>& body) {
    static std::mutex one_at_a_time;
    static uint64_t launches = 0;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (threads.y != 1 || threads.z != 1 || blocks.z != 1) throw std::runtime_error("expected a flat block");
    const char* seed = std::getenv("CUDA_EMULATION_SEED");
    machine.random.seed((seed ? std::strtoull(seed, nullptr, 10) : 0) * 0x9e3779b9u + ++launches);
    const char* skip = std::getenv("CUDA_EMULATION_SKIP");
    machine.skip = skip ? skip : "";
    machine.body = &body;
    std::vector<dim3> order;
    for (unsigned y = 0; y < blocks.y; ++y) {
        for (unsigned x = 0; x < blocks.x; ++x) order.emplace_back(x, y, 0);
    }
    std::shuffle(order.begin(), order.end(), machine.random);
    for (const dim3& block : order) run_block({dim3(), block, threads, blocks}, dynamic_bytes);
}

void barrier(const char* file, int line) {
    Block& block = *machine.block;
    if (skipped(file, line)) return;
    if (block.left) fail("waits at line " + std::to_string(line) + " for threads that have left the kernel");
    if (!block.waiting.empty() && block.line != line) {
        fail("waits at line " + std::to_string(line) + ", others at line " + std::to_string(block.line));
    }
    block.line = line;
    block.waiting.push_back(machine.current);
    if (block.waiting.size() == block.threads) release(block, block.waiting);
    leave(false);
}

bool barrier_or(bool value, const char* file, int line) {
    Block& block = *machine.block;
    if (skipped(file, line)) return value;
    const unsigned vote = machine.current->votes++ % 2;
    block.any = (block.waiting.empty() ? false : block.any) || value;
    block.said[vote] = block.any;
    barrier(file, line);
    return block.said[vote];
}

const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
    Block& block = *machine.block;
    Fiber* self = machine.current;
    Warp& warp = block.warps[self->warp];
    if (mask != ~0u) fail("expected a warp operation of all lanes");
    if (!warp.waiting.empty() && warp.line != line) {
        fail("a warp operation at line " + std::to_string(line) + ", other lanes at line " + std::to_string(warp.line));
    }
    warp.line = line;
    uint64_t* values = warp.values[self->exchanges++ % 2];
    values[self->number % kWarp] = value;
    warp.waiting.push_back(self);
    if (warp.waiting.size() == kWarp) release(block, warp.waiting);
    leave(false);
    return values;
}

void* shared(int line, size_t bytes) {
    std::unique_ptr<char[]>& memory = machine.block->shared[line];
    if (!memory) memory = poisoned(bytes);
    return memory.get();
}

void* dynamic_shared() {
    return machine.block->dynamic.get();
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
    if (bytes != 4 && bytes != 8 && bytes != 16)
        fail("expected to copy 4, 8 or 16 bytes, got " + std::to_string(bytes));
    if (zeros > bytes || reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
        fail("an asynchronous copy that is not aligned or fills more than it holds");
    }
    memset(to, kPoison, bytes);
    machine.current->open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros});
}

void commit_copies() {
    machine.current->committed.push_back(std::move(machine.current->open));
    machine.current->open.clear();
}

void wait_copies(size_t groups_left, const char* file, int line) {
    if (skipped(file, line)) return;
    auto& groups = machine.current->committed;
    for (; groups.size() > groups_left; groups.pop_front()) {
        for (const Copy& copy : groups.front()) {
            memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
            memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
        }
    }
}

}  // namespace emulation
