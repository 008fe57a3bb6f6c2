// Scratch memory on 64-byte boundaries.
#pragma once

#include <stdlib.h>  // posix_memalign is of POSIX, not of C++
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace lors {

// Large blocks are kept by the thread that freed them, up to kKeep bytes: the next matrix usually has the same shape,
// and giving a few megabytes back to the system and faulting them in again costs as much as a fifth of its
// decomposition.
class BlockCache {
  public:
    static constexpr int64_t kLarge = 1 << 14, kKeep = 1 << 26;
    static constexpr int kBlocks = 32;

    // Sizes in steps of a quarter of a power of two, at least 64: with few different sizes a block that was freed fits
    // the next request, and the heap does not fragment, however long the program runs.
    static int64_t round(int64_t bytes) {
        int64_t step = 64;
        while (8 * step <= bytes) step *= 2;
        return (bytes + step - 1) / step * step;
    }
    ~BlockCache() {
        for (Block& block : blocks_) std::free(block.data);
    }
    // A block of at least `bytes`, which becomes its true size; nullptr where there is none.
    void* take(int64_t& bytes) {
        for (Block& block : blocks_) {
            if (block.data && bytes <= block.bytes && block.bytes <= 2 * bytes) {
                kept_ -= bytes = block.bytes;
                return std::exchange(block.data, nullptr);
            }
        }
        return nullptr;
    }
    bool keep(void* data, int64_t bytes) {
        if (bytes > kKeep / 2) return false;
        Block* place = nullptr;
        for (Block& block : blocks_) {
            if (!block.data) place = &block;
        }
        if (!place) {  // one that has been there for long makes room
            place = &blocks_[next_++ % kBlocks];
            drop(*place);
        }
        if (kept_ + bytes > kKeep) {  // start over with the shapes that are in use now
            for (Block& block : blocks_) drop(block);
        }
        *place = {data, bytes};
        kept_ += bytes;
        return true;
    }
    static BlockCache& mine() {
        static thread_local BlockCache cache;
        return cache;
    }

  private:
    struct Block {
        void* data = nullptr;
        int64_t bytes = 0;
    };
    void drop(Block& block) {
        if (!block.data) return;
        std::free(std::exchange(block.data, nullptr));
        kept_ -= block.bytes;
    }

    Block blocks_[kBlocks];
    int64_t kept_ = 0;
    unsigned next_ = 0;
};

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t size) { allocate(size); }
    ~Buffer() { release(); }
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }

    // Forgets what was there; the new contents are undefined.
    void allocate(int64_t size) {
        release();
        size_ = size;
        bytes_ = BlockCache::round(size * static_cast<int64_t>(sizeof(T)) + 1);
        if (bytes_ >= BlockCache::kLarge) data_ = static_cast<T*>(BlockCache::mine().take(bytes_));
        if (data_) return;
        void* fresh = nullptr;  // not aligned_alloc: macOS has it from 10.15 on, Python's builds ask for less
        const bool huge = bytes_ >= kHuge;
        if (posix_memalign(&fresh, huge ? kPage : 64, static_cast<size_t>(bytes_)) != 0) throw std::bad_alloc();
#if defined(__linux__)
        const int64_t filled = size * static_cast<int64_t>(sizeof(T)) / kPage * kPage;
        if (huge) madvise(fresh, static_cast<size_t>(filled), MADV_HUGEPAGE);  // a wish: may be refused
#endif
        data_ = static_cast<T*>(fresh);
    }
    void zero() {
        for (int64_t i = 0; i < size_; ++i) data_[i] = T{};
    }
    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return size_; }

  private:
    // Buffers of delta's size get huge pages, which spare address translation; smaller ones are seldom filled.
    static constexpr int64_t kPage = 1 << 21, kHuge = 1 << 23;

    void release() {
        if (data_ && !(bytes_ >= BlockCache::kLarge && BlockCache::mine().keep(data_, bytes_))) std::free(data_);
        data_ = nullptr;
    }

    T* data_ = nullptr;
    int64_t size_ = 0, bytes_ = 0;
};

}  // namespace lors
