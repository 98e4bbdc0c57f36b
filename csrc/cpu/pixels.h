// What the two ops on the image store share: the check of `index` and the division of [B, H * W]
// into units of work.
#pragma once
#include "../check.h"
#include "parallel.h"

namespace miue {

inline void check_index(const char* op, const int64_t* index, int64_t B, int64_t N) {
    for (int64_t b = 0; index && b < B; b++)
        if (index[b] < 0 || index[b] >= N)  // the message is built only when it is needed
            require(false, op, "index", "rows in [0, " + std::to_string(N) + ")",
                    std::to_string(index[b]) + " at position " + std::to_string(b));
}

// work(b, from, to) on pixels [from, to) of every row of the batch, in units of about 16,384
// values.
template <class Work>
void over_pixels(int64_t B, int64_t C, int64_t plane, int threads, const Work& work) {
    if (B * C * plane == 0) return;
    constexpr int64_t UNIT = 16384, GRAIN = 1024;
    const int64_t wanted = UNIT / C > GRAIN ? UNIT / C / GRAIN * GRAIN : GRAIN,
                  pixels = at_most(wanted, plane);
    const int64_t pieces = (plane + pixels - 1) / pixels,
                  rows = pieces > 1 ? 1 : 1 + UNIT / (C * plane);
    const int64_t groups = (B + rows - 1) / rows;
    Queue queue(groups * pieces);
    parallel(at_most(threads, groups * pieces), [&](int) {
        queue.drain([&](int64_t unit) {
            const int64_t group = unit / pieces * rows, from = unit % pieces * pixels;
            for (int64_t b = group; b < at_most(B, group + rows); b++)
                work(b, from, at_most(plane, from + pixels));
        });
    });
}

}  // namespace miue
