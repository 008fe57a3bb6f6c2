// Stacks to switch between. ucontext would do, but it makes a system call per switch, and a grid makes millions.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

namespace emulation {

// Keeps the registers a call has to preserve on the stack that is left, and takes them from the one that is entered.
extern "C" void emulation_switch(void** left, void* entered) __attribute__((visibility("hidden")));

struct Context {
    void* top = nullptr;

    void prepare(char* stack, size_t bytes, void (*body)()) {
        void** at = reinterpret_cast<void**>(stack + bytes) - 1;  // as after a call: 8 bytes off a multiple of 16
        *at = nullptr;
        *--at = reinterpret_cast<void*>(body);
        for (int saved = 0; saved < 6; ++saved) *--at = nullptr;
        top = at;
    }
    void enter(Context& other) { emulation_switch(&top, other.top); }
};

}  // namespace emulation

#else

#include <ucontext.h>

namespace emulation {

struct Context {
    ucontext_t saved;

    void prepare(char* stack, size_t bytes, void (*body)()) {
        getcontext(&saved);
        saved.uc_stack.ss_sp = stack;
        saved.uc_stack.ss_size = bytes;
        saved.uc_link = nullptr;
        makecontext(&saved, body, 0);
    }
    void enter(Context& other) { swapcontext(&saved, &other.saved); }
};

}  // namespace emulation

#endif
