// Scratch memory on 64-byte boundaries.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace lors {

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t size) { allocate(size); }
    ~Buffer() { std::free(data_); }
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }

    // Forgets what was there; the new contents are undefined.
    void allocate(int64_t size) {
        std::free(data_);
        const int64_t bytes = (size * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(bytes ? bytes : 64)));
        if (!data_) throw std::bad_alloc();
        size_ = size;
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
    T* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace lors
