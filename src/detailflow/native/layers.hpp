// The layers of a transformer on a CPU: products with weights where PyTorch keeps them, norms, attention.
//
// A weight matrix is (out, in), row after row. Every output is one dot product along `in`, added up in one order whatever the
// number of rows, so an image's numbers do not depend on what else is in its batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "amx.hpp"
#include "vector.hpp"

namespace detailflow {

constexpr int OUTPUTS = 8;             // of a product that a thread computes at a time
constexpr int BLOCK = 2048;            // bytes of a weight's row at a time: OUTPUTS of them stay in the first-level cache
constexpr int AHEAD = 16;              // outputs between a tile and the weights that it fetches
constexpr std::size_t FEWEST_FOR_THREADS = std::size_t(1) << 21;  // multiplications of a product that several threads share
constexpr std::size_t FEWEST_NUMBERS = std::size_t(1) << 15;      // of a norm or SwiGLU that they share

// y (M, N) = or += x (M rows) · w (N rows)ᵀ over `size` numbers of rows of `in`; FETCH rows from `ahead` are fetched meanwhile.
template <class T, int M, int N, int FETCH>
inline void tile(const T* x, const T* w, int in, int size, const T* ahead, float* y, std::size_t stride, bool add) {
    constexpr int COUNT = (M * N + LANES - 1) / LANES * LANES;
    Vector acc[COUNT] = {};
    for (int k = 0; k < size; k += Chunk<T>::SIZE) {
        Chunk<T> weights[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            weights[n] = Chunk<T>::load(w + std::size_t(n) * in + k);
            in_register(weights[n].numbers);
            if (n < FETCH) __builtin_prefetch(ahead + std::size_t(n) * in + k, 0, 2);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            auto row = Chunk<T>::load(x + std::size_t(m) * in + k);
            in_register(row.numbers);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[m * N + n] = Chunk<T>::multiply_add(acc[m * N + n], row, weights[n]);
        }
    }
    float total[COUNT];
    for (int i = 0; i < COUNT; i += LANES) store(total + i, sums(acc + i));
    typedef float Outputs __attribute__((vector_size(4 * N)));
    for (int m = 0; m < M; m++) {
        Outputs value, before;
        std::memcpy(&value, total + m * N, sizeof value);
        if (add) std::memcpy(&before, y + m * stride, sizeof before), value += before;
        std::memcpy(y + m * stride, &value, sizeof value);
    }
}

// A weight matrix (out, in) in PyTorch's memory.
template <class T> struct Linear {
    const T* weight;
    int out, in;
};

// N outputs of all rows from output `n` on: M rows at a time, which share the fetching of later weights.
template <class T, int M, int N>
void outputs(const T* x, int rows, const Linear<T>& w, int n, float* y, bool add) {
    constexpr int SIZE = BLOCK / sizeof(T);
    const std::size_t in = w.in, stride = w.out;
    const int passes = rows / M;
    for (int k = 0; k < w.in; k += SIZE, add = true) {
        const T* weight = w.weight + n * in + k;
        int m = 0, fetched = 0;
        auto pass = [&](auto fetch) {
            const T* ahead = weight + (AHEAD + fetched) * in;
            tile<T, M, N, fetch>(x + m * in + k, weight, in, std::min(SIZE, w.in - k), ahead, y + m * stride + n, stride, add);
            m += M, fetched += fetch;
        };
        while (m + M <= rows) {
            if (fetched == N) pass(std::integral_constant<int, 0>());
            else if (passes >= 8) pass(std::integral_constant<int, N / 8 ? N / 8 : 1>());
            else if (passes >= 4) pass(std::integral_constant<int, N / 4>());
            else if (passes >= 2) pass(std::integral_constant<int, N / 2>());
            else pass(std::integral_constant<int, N>());
        }
        for (; m < rows; m++)
            tile<T, 1, N, 0>(x + m * in + k, weight, in, std::min(SIZE, w.in - k), weight, y + m * stride + n, stride, add);
    }
}

// y (rows, out) = or += x (rows, in) · Wᵀ.
template <class T>
void product(const T* x, int rows, const Linear<T>& w, float* y, bool add, int threads) {
    const bool several = threads > 1 && std::size_t(rows) * w.out * w.in > FEWEST_FOR_THREADS;
    if constexpr (sizeof(T) == 2)
        if (amx::available() && w.out % 16 == 0 && w.in % 32 == 0) {
            amx::product(reinterpret_cast<const uint16_t*>(x), rows, reinterpret_cast<const uint16_t*>(w.weight), w.out,
                         w.in, y, add, several ? threads : 1);
            return;
        }
#pragma omp parallel for schedule(static) num_threads(threads) if (several)
    for (int n = 0; n < w.out; n += OUTPUTS) {
        if (rows >= 4 && LANES == 4)
            for (int i = 0; i < OUTPUTS; i += 4) outputs<T, 4, 4>(x, rows, w, n + i, y, add);
        else if (rows >= 2 && LANES == 16) outputs<T, 2, OUTPUTS>(x, rows, w, n, y, add);
        else if (rows >= 2)
            for (int i = 0; i < OUTPUTS; i += 4) outputs<T, 2, 4>(x, rows, w, n + i, y, add);
        else outputs<T, 1, OUTPUTS>(x, rows, w, n, y, add);
    }
}

// x / sqrt(mean(x²) + 1e-5) · weight, row by row.
template <class T> void rms_norm(const float* x, const T* weight, int rows, int width, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * width > FEWEST_NUMBERS)
    for (int m = 0; m < rows; m++) {
        const float* from = x + std::size_t(m) * width;
        T* to = y + std::size_t(m) * width;
        Vector squares = {};
        for (int i = 0; i < width; i += LANES) squares += load(from + i) * load(from + i);
        float scale = 1 / std::sqrt(sum(squares) / width + 1e-5f);
        for (int i = 0; i < width; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
    }
}

// out[q] = softmax(query q · keysᵀ / √size) · values for Q queries of one head.
//   keys (size, length): positions side by side, so that a register holds the scores of many; values (length, size)
template <int Q, class T>
void attend(const float* queries, std::size_t query_stride, const float* keys, const float* values, int length, int size,
            int visible, T* out, std::size_t out_stride, float* scores) {
    const int padded = (visible + LANES - 1) / LANES * LANES;
    const float scale = 1 / std::sqrt(float(size));
    for (int j = 0; j < padded; j += LANES) {
        Vector acc[Q] = {};
        for (int d = 0; d < size; d++) {
            Vector key = load(keys + std::size_t(d) * length + j);
#pragma GCC unroll 8
            for (int q = 0; q < Q; q++) acc[q] += queries[q * query_stride + d] * key;
        }
        for (int q = 0; q < Q; q++) store(scores + q * padded + j, acc[q] * scale);
    }
    float norm[Q];
    for (int q = 0; q < Q; q++) {
        float* row = scores + q * padded;
        for (int j = visible; j < padded; j++) row[j] = -INFINITY;
        Vector top = splat(-INFINITY), total = {};
        for (int j = 0; j < padded; j += LANES) top = max(top, load(row + j));
        const float most = largest(top);
        for (int j = 0; j < padded; j += LANES) {
            Vector p = exp(load(row + j) - most);
            store(row + j, p);
            total += p;
        }
        norm[q] = 1 / sum(total);
    }
    for (int d = 0; d < size; d += LANES) {
        Vector acc[Q] = {};
        for (int j = 0; j < visible; j++) {
            Vector value = load(values + std::size_t(j) * size + d);
#pragma GCC unroll 8
            for (int q = 0; q < Q; q++) acc[q] += scores[q * padded + j] * value;
        }
        for (int q = 0; q < Q; q++)
            store(out + q * out_stride + d, acc[q] * norm[q]);
    }
}

}  // namespace detailflow
