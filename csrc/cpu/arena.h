// Cuts a workspace into arrays on cache-line boundaries; with a null base it only counts.
#pragma once
#include <cstddef>
#include <cstdint>

namespace miue {

class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
    template <class T>
    T* take(int64_t count) {
        T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return at;
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

}  // namespace miue
