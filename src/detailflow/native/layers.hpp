// The layers of a transformer on a CPU: products with weights where PyTorch keeps them, norms, attention.
//
// A weight matrix is (out, in), row after row. Every output is one dot product along `in`, added up in one order whatever the
// number of rows, so an image's numbers do not depend on what else is in its batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <unistd.h>
#include <vector>

#include "amx.hpp"
#include "vector.hpp"

namespace detailflow {

constexpr int BLOCK = 2048;  // bytes of a weight's row at a time: eight of them stay in the first-level cache
constexpr int MANY = 64;      // rows: of more, a block of each goes past all weights first, as whole ones would not stay in the caches
constexpr int FARTHER = 6144;  // bytes: weights that will be fetched into the first-level cache come into the second so much earlier
constexpr std::size_t FEWEST_FOR_THREADS = std::size_t(1) << 18;  // multiplications of a product that several threads share
constexpr std::size_t FEWEST_NUMBERS = std::size_t(1) << 15;      // of a norm, SwiGLU or rows to pack that they share

// How many outputs of a product a thread computes at a time: the weights for eight stay in the first-level cache while pairs of rows
// pass; eight rows stay there themselves.
constexpr int outputs_at_once(int M) { return M >= 8 ? 16 : 8; }

// If the weights of the next outputs fit into the first-level cache beside those of these: then they are fetched into it, in the order of
// memory. Otherwise later ones go into the second level. (Pieces of longer rows than a block push each other out of the first.)
inline bool fetched_near(int M, std::size_t bytes_of_row) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    static const long cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return bytes_of_row <= BLOCK && 2 * outputs_at_once(M) * BLOCK < cache;
#else
    return false;
#endif
}

// y (M, N) = or += x (M packed rows) · w (N rows)ᵀ over `size` numbers of rows of `in`; FETCH rows from `ahead` are fetched
// meanwhile. Never inlined: among other code compilers keep the sums in memory, and products take 1.7 times as long.
template <class T, int M, int N, int FETCH, bool NEAR>
[[gnu::noinline]] void tile(const Factor<T>* x, const T* w, int in, int size, const T* ahead, float* y, std::size_t stride,
                            bool add) {
    constexpr int COUNT = (M * N + LANES - 1) / LANES * LANES;
    Vector acc[COUNT] = {};
    for (int k = 0; k < size; k += Chunk<T>::SIZE) {
        Chunk<T> weights[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            weights[n] = Chunk<T>::load(w + std::size_t(n) * in + k);
            weights[n].keep();
            const std::size_t later = NEAR ? k * FETCH + n * Chunk<T>::SIZE : std::size_t(n) * in + k;
            if (n < FETCH) __builtin_prefetch(ahead + later, 0, NEAR ? 3 : 2);
            if (NEAR && n < FETCH && FETCH < N) __builtin_prefetch(ahead + later + FARTHER / sizeof(T), 0, 2);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            auto row = Chunk<T>::load(x + std::size_t(k) * M + m * Chunk<T>::SIZE);
            row.keep();
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

// Call `use` with the largest of MOST, MOST/2, …, 1, 0 that is not above `wanted`, as a constant.
template <int MOST, class Use> void at_most(int wanted, Use use) {
    if constexpr (MOST == 0) use(std::integral_constant<int, 0>());
    else if (wanted >= MOST) use(std::integral_constant<int, MOST>());
    else at_most<MOST / 2>(wanted, use);
}

// Put rows of `in` numbers in the order in which tiles of M rows take them: a chunk of each of the M, then their next chunks; rows
// that are left at the end stay single. As they come, they are a power of two apart, and push each other out of the cache.
template <class T, int M> const Factor<T>* packed(const T* x, int rows, int in, int threads) {
    static thread_local Array<Factor<T>> memory;
    memory.resize(std::size_t(rows) * in);
    Factor<T>* to = memory.data();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * in > FEWEST_NUMBERS)
    for (int m = 0; m < rows; m++) {
        const int first = m / M * M, together = first + M <= rows ? M : 1, at = together > 1 ? m - first : 0;
        for (int k = 0; k < in; k += Chunk<T>::SIZE)
            Chunk<T>::load(x + std::size_t(m) * in + k).store(to + std::size_t(m - at) * in + k * together + at * Chunk<T>::SIZE);
    }
    return to;
}

// A weight matrix (out, in) in PyTorch's memory.
template <class T> struct Linear {
    const T* weight;
    int out, in;
};

// So many outputs of all packed rows, from output `n` on, along inputs `first` to `last`, in tiles of M rows and N outputs, which share
// the fetching of later weights.
template <class T, int M, int N, bool NEAR>
void outputs(const Factor<T>* x, int rows, const Linear<T>& w, int n, int first, int last, float* y, bool add) {
    constexpr int SIZE = BLOCK / sizeof(T), COUNT = outputs_at_once(M), AHEAD = NEAR ? COUNT : 16;
    const std::size_t in = w.in, stride = w.out;
    const int fetches = std::max(1, N / (rows / M));  // N rows of later weights for the N of a tile
    for (int k = first; k < last; k += SIZE, add = true) {
        const T* weight = w.weight + n * in + k;
        const int size = std::min(SIZE, last - k);
        int m = 0, fetched = 0;
        for (; m + M <= rows; m += M)
            for (int i = 0; i < COUNT; i += N)
                at_most<N>(fetched < COUNT ? fetches : 0, [&](auto fetch) {
                    tile<T, M, N, fetch, NEAR>(x + m * in + k * M, weight + i * in, in, size, weight + (AHEAD + fetched) * in,
                                               y + m * stride + n + i, stride, add);
                    fetched += fetch;
                });
        for (; m < rows; m++)
            for (int i = 0; i < COUNT; i += 8)
                tile<T, 1, 8, 0, NEAR>(x + m * in + k, weight + i * in, in, size, weight, y + m * stride + n + i, stride, add);
    }
}

// y (rows, out) = or += x (rows, in) · Wᵀ.
template <class T>
void product(const T* x, int rows, const Linear<T>& w, float* y, bool add, int threads) {
    if (rows == 0) return;
    if (std::size_t(rows) * w.out * w.in <= FEWEST_FOR_THREADS) threads = 1;
    if constexpr (sizeof(T) == 2)
        if (amx::available() && w.out % 16 == 0 && w.in % 32 == 0) {
            amx::product(reinterpret_cast<const uint16_t*>(x), rows, reinterpret_cast<const uint16_t*>(w.weight), w.out,
                         w.in, y, add, threads);
            return;
        }
    auto in_tiles = [&](auto tile) {
        constexpr int M = decltype(tile)::rows, N = decltype(tile)::outputs;
        const Factor<T>* factors = packed<T, M>(x, rows, w.in, threads);
        const auto some = fetched_near(M, w.in * sizeof(T)) ? outputs<T, M, N, true> : outputs<T, M, N, false>;
        const int part = rows > MANY ? BLOCK / int(sizeof(T)) : w.in;
#pragma omp parallel num_threads(threads) if (threads > 1)
        for (int k = 0; k < w.in; k += part) {
#pragma omp for schedule(static) nowait
            for (int n = 0; n < w.out; n += outputs_at_once(M)) some(factors, rows, w, n, k, std::min(k + part, w.in), y, add || k);
        }
    };
    using Largest = typename Chunk<T>::Largest;
    if (rows >= Largest::rows) in_tiles(Largest());
    else if (rows >= 4) in_tiles(Tile<4, 4>());
    else if (rows >= 2) in_tiles(Tile<2, Chunk<T>::OF_TWO_ROWS>());
    else in_tiles(Tile<1, 8>());
}

// x · scale · weight with scale = 1 / sqrt(mean(x²) + 1e-5), row by row; the scales are kept if there is a place for them.
template <class T, class W>
void rms_norm(const float* x, const W* weight, int rows, int width, T* y, int threads, float* scales = nullptr) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * width > FEWEST_NUMBERS)
    for (int m = 0; m < rows; m++) {
        const float* from = x + std::size_t(m) * width;
        T* to = y + std::size_t(m) * width;
        Vector squares = {};
        for (int i = 0; i < width; i += LANES) squares += load(from + i) * load(from + i);
        float scale = 1 / std::sqrt(sum(squares) / width + 1e-5f);
        if (scales) scales[m] = scale;
        for (int i = 0; i < width; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
    }
}

// scores → weights, e^(score − largest), 0 from `length` on up to `padded`, a multiple of LANES. Returns 1 / their sum.
template <class F> float softmax(float* scores, int length, int padded, F* weights) {
    for (int j = length; j < padded; j++) scores[j] = -INFINITY;
    Vector top = splat(-INFINITY), total = {};
    for (int j = 0; j < padded; j += LANES) top = max(top, load(scores + j));
    const float most = largest(top);
    for (int j = 0; j < padded; j += LANES) {
        const Vector p = exp(load(scores + j) - most);
        store(weights + j, p);
        total += p;
    }
    return 1 / sum(total);
}

// out[q] = softmax(query q · keysᵀ / √size) · values for Q queries of one head.
//   keys (size, length): positions side by side, so that a register holds the scores of many; values (length, size); those of the next
//   head come next in memory and are fetched meanwhile
template <int Q, class T>
void attend(const float* queries, std::size_t query_stride, const T* keys, const T* values, int length, int size,
            int visible, T* out, std::size_t out_stride, float* scores) {
    const int padded = (visible + LANES - 1) / LANES * LANES;
    const float scale = 1 / std::sqrt(float(size));
    for (int j = 0; j < padded; j += LANES) {
        Vector acc[Q] = {};
        for (int d = 0; d < size; d++) {
            Vector key = load(keys + std::size_t(d) * length + j);
            __builtin_prefetch(keys + std::size_t(size + d) * length + j, 0, 2);
#pragma GCC unroll 8
            for (int q = 0; q < Q; q++) acc[q] += queries[q * query_stride + d] * key;
        }
        for (int q = 0; q < Q; q++) store(scores + q * padded + j, acc[q] * scale);
    }
    float norm[Q];
    for (int q = 0; q < Q; q++) norm[q] = softmax(scores + q * padded, visible, padded, scores + q * padded);
    for (int d = 0; d < size; d += LANES) {
        Vector acc[Q] = {};
        for (int j = 0; j < visible; j++) {
            Vector value = load(values + std::size_t(j) * size + d);
            __builtin_prefetch(values + std::size_t(length + j) * size + d, 0, 2);
#pragma GCC unroll 8
            for (int q = 0; q < Q; q++) acc[q] += scores[q * padded + j] * value;
        }
        for (int q = 0; q < Q; q++)
            store(out + q * out_stride + d, acc[q] * norm[q]);
    }
}

}  // namespace detailflow
