// Convolutions on matrix tiles: what matrix_conv.cpp and matrix_weight_grad.cpp, which divide the
// work, ask of a processor with AMX (matrix_amx.cpp) or of plain C++ (matrix_plain.cpp).
#pragma once
#include <cstdint>
#include <vector>

#include "../ops.h"

namespace miue {

// A matrix tile has 16 rows of 64 bytes: 16 images of 32 bf16 channels, or 16 x 16 f32 sums.
constexpr int64_t TILE = 16, DEPTH = 32, SIDE = 512;  // SIDE: bf16 values of a tile
// Images, and result channels, whose sums are taken together: two tiles each way.
constexpr int64_t IMAGES = 2 * TILE, RESULTS = 2 * TILE;
// [half of the images][half of the results][16][16], and a line more: powers of two would meet in the same cache sets
constexpr int64_t SUMS_STEP = IMAGES * RESULTS + 16;

// A tap of one pixel.
struct MatrixTap {
    const uint16_t* pixel;  // the pixel that meets it: images x 32 channels of the first block
    int32_t number;
};

// The sums of one pixel: over `taps` taps and `blocks` blocks of 32 channels.
struct MatrixProducts {
    const MatrixTap* tap;
    int64_t taps, blocks;
    int64_t pixel_step;     // values between a pixel's blocks
    const uint16_t* panel;  // weights [block][tap][half of the results][16][32]
    int64_t panel_step;     // values between blocks
    bool add, wide;         // to the sums that there are; both halves of the results
    float* sums;
};

// The results of one image at some pixels in a row, whose sums are SUMS_STEP values apart.
struct MatrixResults {
    const float* sums;                // of the first pixel, first panel of 32 results
    int64_t pixels, panels, results;  // results: those of all the panels, a part of the last
    int64_t panel_step;               // values between the sums of panels
    int64_t place;                    // values before the first pixel's first result
};

// Sums of a weight gradient: [tap][half of the channels][half of the results][16 channels][16 results].
constexpr int64_t TAP_SUMS = 4 * TILE * TILE;

struct MatrixKernels {
    void (*begin)(int64_t images);  // of the sums that follow, on this thread
    void (*products)(const MatrixProducts&);
    void (*results)(const MatrixConvArgs&, const float* bias, const MatrixResults&);
    void (*end)();
    // 32 images of one pixel, 32 channels each (rows `step` values apart; fewer than 32 images or channels: zeros), as the first
    // factor of a sum over images [channel][image], or as the second [image / 2][channel][image % 2].
    void (*across)(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                   uint16_t* to);
    void (*along)(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                  uint16_t* to);
    // sums += over `count` pixels of the products of x[i] and grad[i], two tiles each way.
    void (*outer)(const uint16_t* const* x, const uint16_t* const* grad, int64_t count,
                  float* sums);
};

extern const MatrixKernels amx_kernels, plain_kernels;
bool amx_starts();  // asks the system for the tiles, once; whether this process has them
const MatrixKernels& matrix_kernels(const char* op, bool plain);

inline int64_t parts(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// [result coordinate][tap]: the input coordinate that the tap reads, or -1; of one dimension d.
inline std::vector<int64_t> tap_sources(const MatrixConvShape& a, int d) {
    const int64_t results = d ? a.Q : a.P, taps = d ? a.S : a.R, extent = d ? a.W : a.H;
    std::vector<int64_t> found;
    for (int64_t at = 0; at < results; at++)
        for (int64_t tap = 0; tap < taps; tap++) {
            const int64_t reach = tap * a.dilation[d] - a.padding[d];
            int64_t from = a.back ? at - reach : at * a.stride[d] + reach;
            if (a.back) from = from >= 0 && from % a.stride[d] == 0 ? from / a.stride[d] : -1;
            found.push_back(from >= 0 && from < extent ? from : -1);
        }
    return found;
}

}  // namespace miue
