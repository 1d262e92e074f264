// The transformer of the tokenizer (docs/method.md#tokenizer): pre-norm blocks, in which positions attend to each other, and an
// encoder's queries also to the patches, which went through before.
#pragma once
#include <array>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "layers.hpp"

namespace detailflow {

struct ViTSizes {  // as ViTConfig names them; Python fills the same structure
    int32_t width, depth, heads, hidden;
};

// y = (x − mean) / √(variance + 1e-6) · weight + bias, row by row.
template <class T>
void layer_norm(const float* x, const T* weight, const T* bias, int rows, int width, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * width > FEWEST_NUMBERS)
    for (int m = 0; m < rows; m++) {
        const float* from = x + std::size_t(m) * width;
        Vector total = {}, squares = {};
        for (int i = 0; i < width; i += LANES) total += load(from + i);
        const float mean = sum(total) / width;
        for (int i = 0; i < width; i += LANES) squares += (load(from + i) - mean) * (load(from + i) - mean);
        const float scale = 1 / std::sqrt(sum(squares) / width + 1e-6f);
        for (int i = 0; i < width; i += LANES)
            store(y + std::size_t(m) * width + i, (load(from + i) - mean) * scale * load(weight + i) + load(bias + i));
    }
}

// GELU in its tanh form: x · (1 + tanh(√(2/π)·(x + 0.044715·x³))) / 2 = x / (1 + e^(−2·√(2/π)·(x + 0.044715·x³))).
inline Vector gelu(Vector x) { return x / (1.0f + exp(x * (x * x * -0.07135481f - 1.59576912f))); }

// to (Q, N·LANES) = a (Q, k) · b (k, N·LANES), with E = 4 / sizeof(F) neighbours of k side by side in b: (k / E, N·LANES, E).
template <int Q, int N, class F>
void small_product(const F* a, int a_stride, const F* b, int b_stride, int steps, float* to, int to_stride) {
    constexpr int E = 4 / sizeof(F);
    Vector acc[Q * N] = {};
    for (int k = 0; k < steps; k++) {
        Chunk<F> columns[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            columns[n] = Chunk<F>::load(b + std::size_t(k) * b_stride + n * Chunk<F>::SIZE);
            columns[n].keep();
        }
#pragma GCC unroll 8
        for (int q = 0; q < Q; q++) {
            const auto number = Chunk<F>::spread(a + std::size_t(q) * a_stride + k * E);
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) acc[q * N + n] = Chunk<F>::multiply_add(acc[q * N + n], number, columns[n]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) store(to + std::size_t(q) * to_stride + n * LANES, acc[q * N + n]);
}

// All columns of `b`, a multiple of LANES.
template <int Q, class F> void small_products(const F* a, int a_stride, const F* b, int columns, int steps, float* to) {
    constexpr int E = 4 / sizeof(F);
    int n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES) small_product<Q, 2>(a, a_stride, b + n * E, columns * E, steps, to + n, columns);
    if (n < columns) small_product<Q, 1>(a, a_stride, b + n * E, columns * E, steps, to + n, columns);
}

// One head of one image after another: `put` keys and values, of as many positions as there are, then `attend`.
template <class T> class HeadAttention {
    using F = Factor<T>;
    static constexpr int E = 4 / sizeof(F), Q = 8;

public:
    HeadAttention(int size, int positions)
        : size(size), positions(positions), padded((positions + LANES - 1) / LANES * LANES), keys(std::size_t(padded) * size, F()),
          values(keys), row(size), queries(Q * size, F()), weights(std::size_t(Q) * padded), scores(weights.size()), sums(Q * size) {}

    void put(const T* more_keys, const T* more_values, int length) {
        for (int j = 0; j < length; j++, known++) {
            const F* key = converted(more_keys + std::size_t(j) * size);
            F* to = &keys[std::size_t(known) * E];
            for (int d = 0; d < size; d += E) std::memcpy(to + std::size_t(d) * padded, key + d, 4);
            const F* value = converted(more_values + std::size_t(j) * size);
            to = &values[std::size_t(known / E) * size * E + known % E];
            for (int d = 0; d < size; d++) to[d * E] = value[d];
        }
    }

    // out (length, ·) = softmax(queries · keysᵀ) · values; from (length, size): the queries; mask (length, positions), or null.
    void attend(const T* from, int length, const uint8_t* mask, T* out, std::size_t stride) {
        for (int first = 0; first < length; first += Q) {
            const int some = std::min(Q, length - first);
            for (int q = 0; q < some; q++)
                std::memcpy(&queries[q * size], converted(from + std::size_t(first + q) * size), size * sizeof(F));
            small_products<Q>(queries.data(), size, keys.data(), padded, size / E, scores.data());
            float norm[Q];
            for (int q = 0; q < some; q++) {
                float* score = &scores[std::size_t(q) * padded];
                for (int j = 0; mask && j < positions; j++)
                    if (!mask[std::size_t(first + q) * positions + j]) score[j] = -INFINITY;
                norm[q] = softmax(score, positions, padded, &weights[std::size_t(q) * padded]);
            }
            small_products<Q>(weights.data(), padded, values.data(), size, padded / E, sums.data());
            for (int q = 0; q < some; q++)
                for (int d = 0; d < size; d += LANES) store(out + (first + q) * stride + d, load(&sums[q * size + d]) * norm[q]);
        }
        known = 0;
    }

private:
    const F* converted(const T* numbers) {
        if constexpr (std::is_same_v<T, F>) return numbers;
        for (int d = 0; d < size; d += LANES) store(&row[d], load(numbers + d));
        return row.data();
    }

    const int size, positions, padded;  // padded: a multiple of LANES; numbers beyond the positions are zeros
    int known = 0;
    Array<F> keys, values, row;  // (size / E, padded, E), (padded / E, size, E)
    Array<F> queries, weights;   // (Q, size), (Q, padded)
    Array<float> scores, sums;   // (Q, padded), (Q, size)
};

template <class T> class ViT {
public:
    struct Sequences {  // what goes through the blocks
        float* x;  // (images, length, width), changed in place
        int images, length;
        void* const* own;         // of each block: where keys and values go, (images, heads, length, size) each; or null
        const void* const* past;  // of each block: keys and values that come before, (images, heads, past_length, size) each; or null
        int past_length;
        const uint8_t* mask;  // (length, past_length + length): 0 where a position does not attend to another; or null
    };

    // `weights`, of each block: norm, qkv, proj, norm, fc1, fc2, each with its bias.
    ViT(const ViTSizes& sizes, const void* const* weights, int threads) : sizes(sizes), threads(threads) {
        auto next = [&] { return static_cast<const T*>(*weights++); };
        auto affine = [&](int out, int in) {
            const T* weight = next();
            return Affine{{weight, out, in}, next()};
        };
        const int width = sizes.width, hidden = sizes.hidden;
        for (int i = 0; i < sizes.depth; i++) {
            Block block;
            block.norm1 = affine(width, 1), block.qkv = affine(3 * width, width), block.proj = affine(width, width);
            block.norm2 = affine(width, 1), block.fc1 = affine(hidden, width), block.fc2 = affine(width, hidden);
            blocks.push_back(block);
        }
    }

    // x += attention(norm(x)), x += MLP(norm(x)) in each block.
    void run(const Sequences& all) {
        const int rows = all.images * all.length;
        normed.resize(std::size_t(rows) * sizes.width), attended.resize(normed.size()), queries.resize(normed.size());
        qkv.resize(3 * normed.size()), before.resize(std::size_t(rows) * sizes.hidden), after.resize(before.size());
        for (int layer = 0; layer < sizes.depth; layer++) {
            const Block& block = blocks[layer];
            norm(all.x, block.norm1, rows);
            product(normed.data(), rows, block.qkv.linear, qkv.data(), false, threads);
            attention(all, layer);
            add(all.x, block.proj, attended.data(), rows);
            norm(all.x, block.norm2, rows);
            product(normed.data(), rows, block.fc1.linear, before.data(), false, threads);
            activate(block.fc1.bias, rows);
            add(all.x, block.fc2, after.data(), rows);
        }
    }

private:
    struct Affine {  // the bias is added by what comes next
        Linear<T> linear;
        const T* bias;
    };
    struct Block { Affine norm1, qkv, proj, norm2, fc1, fc2; };

    void norm(const float* x, const Affine& norm, int rows) {
        layer_norm(x, norm.linear.weight, norm.bias, rows, sizes.width, normed.data(), threads);
    }

    void add(float* x, const Affine& affine, const T* from, int rows) const {  // x += from · Wᵀ + bias
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * sizes.width > FEWEST_NUMBERS)
        for (int m = 0; m < rows; m++)
            for (int i = 0; i < sizes.width; i += LANES) {
                float* to = x + std::size_t(m) * sizes.width + i;
                store(to, load(to) + load(affine.bias + i));
            }
        product(from, rows, affine.linear, x, true, threads);
    }

    void activate(const T* bias, int rows) {
        const int hidden = sizes.hidden;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && before.size() > FEWEST_NUMBERS)
        for (int m = 0; m < rows; m++)
            for (int i = 0; i < hidden; i += LANES) {
                const std::size_t at = std::size_t(m) * hidden + i;
                store(&after[at], gelu(load(&before[at]) + load(bias + i)));
            }
    }

    // qkv (images, length, 3, heads, size) → attended (images, length, heads, size).
    void attention(const Sequences& all, int layer) {
        const int length = all.length, heads = sizes.heads, width = sizes.width, size = width / heads;
        const int positions = all.past_length + length;
        auto past = [&](int part) { return static_cast<const T*>(all.past[2 * layer + part]); };
        auto own = [&](int part, Array<T>& here) {
            if (all.own) return static_cast<T*>(all.own[2 * layer + part]);
            here.resize(attended.size());
            return here.data();
        };
        T *own_keys = own(0, keys), *own_values = own(1, values);
        const bool several = threads > 1 && std::size_t(all.images) * length * positions * width > FEWEST_FOR_THREADS;
        std::vector<HeadAttention<T>> workers(several ? threads : 1, HeadAttention<T>(size, positions));
#pragma omp parallel for schedule(static) num_threads(threads) if (several)
        for (int both = 0; both < all.images * heads; both++) {
            const std::size_t at = std::size_t(both) * size, image = std::size_t(both / heads) * length * width;
            const int offset = both % heads * size;
            T *query = &queries[at * length], *key = own_keys + at * length, *value = own_values + at * length;
            split(&qkv[3 * image + offset], blocks[layer].qkv.bias + offset, length, {query, key, value});
#if defined(_OPENMP)
            HeadAttention<T>& head = workers[omp_get_thread_num()];
#else
            HeadAttention<T>& head = workers[0];
#endif
            if (all.past) head.put(past(0) + at * all.past_length, past(1) + at * all.past_length, all.past_length);
            head.put(key, value, length);
            head.attend(query, length, all.mask, &attended[image + offset], width);
        }
    }

    // One head's queries / √size, keys and values, each (length, size), of `from` (length, 3, heads, size) and the bias.
    void split(const float* from, const T* bias, int length, std::array<T*, 3> to) const {
        const int width = sizes.width, size = width / sizes.heads;
        for (int part = 0; part < 3; part++) {
            const float scale = part ? 1 : 1 / std::sqrt(float(size));
            for (int i = 0; i < length; i++)
                for (int d = 0; d < size; d += LANES) {
                    const Vector number = load(from + (std::size_t(i) * 3 + part) * width + d) + load(bias + part * width + d);
                    store(to[part] + std::size_t(i) * size + d, number * scale);
                }
        }
    }

    const ViTSizes sizes;
    const int threads;
    std::vector<Block> blocks;
    Array<float> qkv, before;
    Array<T> normed, queries, keys, values, attended, after;
};

}  // namespace detailflow
