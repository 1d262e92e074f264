// Products of bfloat16 matrices by AMX tiles, where the processor has them and the system lets a process use them.
//
// A tile of weights, 16 outputs × 32 inputs, is taken from PyTorch's memory as it is; the rows of x are put in pairs first.
// So a tile of sums is (outputs, rows), and is turned when it is stored.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace detailflow::amx {

#if defined(__AMX_BF16__) && defined(__linux__)

inline bool available() {  // only if asked for: nobody has seen it at work yet
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
    static const bool granted =
        std::getenv("DETAILFLOW_AMX") && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

struct alignas(64) Shapes {  // of the eight tiles: 16 rows of 64 bytes each
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void product(const uint16_t* x, int rows, const uint16_t* weight, int out, int in, float* y, bool add,
                    int threads) {
    const int blocks = (rows + 15) / 16, depth = in / 32;
    std::vector<uint32_t> pairs(std::size_t(blocks) * depth * 256);  // (blocks, depth, 16 pairs, 16 rows)
    for (int m = 0; m < rows; m++)
        for (int k = 0; k < in; k += 2)
            std::memcpy(&pairs[((std::size_t(m / 16) * depth + k / 32) * 16 + k % 32 / 2) * 16 + m % 16],
                        x + std::size_t(m) * in + k, 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
    Shapes shapes;
    _tile_loadconfig(&shapes);  // in each product, as other libraries leave shapes of their own
#pragma omp for schedule(static)
    for (int n = 0; n < out; n += 16) {
        const uint16_t* w = weight + std::size_t(n) * in;
        alignas(64) float sums[16][16];
        for (int block = 0; block < blocks; block++) {
            _tile_zero(0);
            for (int k = 0; k < depth; k++) {
                _tile_loadd(1, w + k * 32, in * 2);
                _tile_loadd(2, &pairs[(std::size_t(block) * depth + k) * 256], 64);
                _tile_dpbf16ps(0, 1, 2);
            }
            _tile_stored(0, sums, 64);
            for (int m = block * 16; m < rows && m < block * 16 + 16; m++)
                for (int i = 0; i < 16; i++) {
                    float& value = y[std::size_t(m) * out + n + i];
                    value = add ? value + sums[i][m % 16] : sums[i][m % 16];
                }
        }
    }
    _tile_release();
    }
}

#else

inline bool available() { return false; }
inline void product(const uint16_t*, int, const uint16_t*, int, int, float*, bool, int) {}

#endif

}  // namespace detailflow::amx
