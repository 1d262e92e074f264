// What training does to numbers one by one or row by row, forward and backward, each in one pass through memory. Products stay
// PyTorch's. Numbers of type T are what products take and give: float, or bfloat16 under autocast.
#pragma once
#include <algorithm>

#include "vit.hpp"

namespace detailflow {

// Call `use(first, end)` for parts of `count`, a multiple of LANES, shared by the threads.
template <class Use> void in_parts(std::size_t count, int threads, Use use) {
    const std::size_t part = (count / LANES + threads - 1) / threads * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > FEWEST_NUMBERS)
    for (int i = 0; i < threads; i++)
        for (std::size_t at = i * part, end = std::min(count, at + part); at < end; at += LANES) use(at);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp(-x)); }

// The derivative of `gelu`: with s = sigmoid(2u), u = √(2/π)·(x + 0.044715·x³), it is s + x·s·(1 − s)·2u′.
inline Vector gelu_slope(Vector x) {
    const Vector squared = x * x, s = sigmoid(x * (squared * 0.07135481f + 1.59576912f));
    return s + x * s * (1.0f - s) * (squared * 0.21406443f + 1.59576912f);
}

template <class T> void gelu(const T* x, std::size_t count, T* y, int threads) {
    in_parts(count, threads, [=](std::size_t i) { store(y + i, gelu(load(x + i))); });
}

template <class T> void gelu_backward(const T* x, const T* dy, std::size_t count, T* dx, int threads) {
    in_parts(count, threads, [=](std::size_t i) { store(dx + i, load(dy + i) * gelu_slope(load(x + i))); });
}

// y = silu(gate) · up.
template <class T> void swiglu(const T* gate, const T* up, std::size_t count, T* y, int threads) {
    in_parts(count, threads, [=](std::size_t i) { store(y + i, load(gate + i) * sigmoid(load(gate + i)) * load(up + i)); });
}

template <class T>
void swiglu_backward(const T* gate, const T* up, const T* dy, std::size_t count, T* dgate, T* dup, int threads) {
    in_parts(count, threads, [=](std::size_t i) {
        const Vector x = load(gate + i), s = sigmoid(x), d = load(dy + i);
        store(dup + i, d * x * s);
        store(dgate + i, d * load(up + i) * s * (1.0f + x * (1.0f - s)));
    });
}

// Random bits of a counter: twice the mixing that ends MurmurHash3, each from a seed of its own.
inline Bits mixed(Bits x) {
    x ^= x >> 16, x *= 0x85ebca6bu;
    x ^= x >> 13, x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// y = x · keep / (1 − p), or added to `onto`: keep is 1 with probability 1 − p, by two seeds; so the backward pass draws it again.
template <class T, class O>
void dropout(const T* x, const float* onto, std::size_t count, float p, uint64_t seed, O* y, int threads) {
    const Bits limit = Bits{} + uint32_t(p * 4294967296.0), first = Bits{} + uint32_t(seed), second = Bits{} + uint32_t(seed >> 32);
    const float scale = 1 / (1 - p);
    Bits lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    in_parts(count, threads, [=](std::size_t i) {
        const Bits bits = mixed(mixed((lanes + uint32_t(i)) ^ first) + second);
        const Vector kept = bits >= limit ? load(x + i) * scale : Vector{};
        store(y + i, onto ? load(onto + i) + kept : kept);
    });
}

constexpr int PARTS = 16;  // of rows whose gradients are added up one after another, whatever the number of threads

// Of `rms_norm`, whose scales were kept: dx = scale · (dy · weight − x · scale² · mean(dy · weight · x)); parts (PARTS, width): their sums are the weight's gradient.
template <class T>
void rms_backward(const float* x, const float* weight, const float* scales, const T* dy, int rows, int width, float* dx,
                  float* parts, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * width > FEWEST_NUMBERS)
    for (int part = 0; part < PARTS; part++) {
        float* total = parts + std::size_t(part) * width;
        std::fill(total, total + width, 0.0f);
        for (int m = int(int64_t(rows) * part / PARTS); m < int(int64_t(rows) * (part + 1) / PARTS); m++) {
            const float* from = x + std::size_t(m) * width;
            const T* slope = dy + std::size_t(m) * width;
            const float scale = scales[m];
            Vector along = {};
            for (int i = 0; i < width; i += LANES) {
                const Vector both = load(slope + i) * load(from + i);
                along += both * load(weight + i);
                store(total + i, load(total + i) + both * scale);
            }
            const float back = sum(along) * scale * scale / width;
            for (int i = 0; i < width; i += LANES)
                store(dx + std::size_t(m) * width + i, scale * (load(slope + i) * load(weight + i) - load(from + i) * back));
        }
    }
}

// Pairs of neighbours (a, b) turned by (cos, sin): (a·cos − b·sin, a·sin + b·cos); back with −sin.
template <std::size_t... I> inline Vector turned(Vector x, Vector rotation, float sign, std::index_sequence<I...>) {
    const Vector cos = __builtin_shufflevector(rotation, rotation, int(I & ~std::size_t(1))...);
    const Vector sin = __builtin_shufflevector(rotation, rotation, int(I | 1)...);
    const Vector other = __builtin_shufflevector(x, x, int(I ^ 1)...), signs = {(I & 1 ? 1.0f : -1.0f)...};
    return x * cos + other * sin * signs * sign;
}

// qkv (images, length, 3, heads, size) → each of three (images, heads, length, size), queries and keys turned by (length, size / 2, 2)
// cosines and sines; or, `back`, their gradients → that of qkv.
template <class T>
void split_heads(T* qkv, T* const* parts, const float* rotation, int images, int length, int heads, int size, bool back, int threads) {
    const int rows = images * length;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * heads * size > FEWEST_NUMBERS)
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 3; part++)
            for (int head = 0; head < heads; head++) {
                const int image = row / length, at = row % length;
                T* together = qkv + ((std::size_t(row) * 3 + part) * heads + head) * size;
                T* alone = parts[part] + ((std::size_t(image) * heads + head) * length + at) * size;
                const T* from = back ? alone : together;
                T* to = back ? together : alone;
                for (int d = 0; d < size; d += LANES) {
                    Vector x = load(from + d);
                    if (rotation && part < 2)
                        x = turned(x, load(rotation + std::size_t(at) * size + d), back ? -1 : 1, std::make_index_sequence<LANES>());
                    store(to + d, x);
                }
            }
}

// −log softmax(logits)[wanted] of each row, and the logarithm of Σ e^logit, which is kept.
template <class T>
void cross_entropy(const T* logits, const int64_t* wanted, int rows, int codes, float* losses, float* logs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * codes > FEWEST_NUMBERS)
    for (int m = 0; m < rows; m++) {
        const T* row = logits + std::size_t(m) * codes;
        Vector top = splat(-INFINITY), total = {};
        for (int i = 0; i < codes; i += LANES) top = max(top, load(row + i));
        const float most = largest(top);
        for (int i = 0; i < codes; i += LANES) total += exp(load(row + i) - most);
        logs[m] = most + std::log(sum(total));
        losses[m] = logs[m] - to_float(row[wanted[m]]);
    }
}

// (softmax(logits) − 1 at `wanted`) · scale.
template <class T>
void cross_entropy_backward(const T* logits, const int64_t* wanted, const float* logs, float scale, int rows, int codes, T* to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && std::size_t(rows) * codes > FEWEST_NUMBERS)
    for (int m = 0; m < rows; m++) {
        const T* row = logits + std::size_t(m) * codes;
        T* slopes = to + std::size_t(m) * codes;
        for (int i = 0; i < codes; i += LANES) store(slopes + i, exp(load(row + i) - logs[m]) * scale);
        const float p = std::exp(to_float(row[wanted[m]]) - logs[m]);
        store(slopes + wanted[m], (p - 1) * scale);
    }
}

}  // namespace detailflow
