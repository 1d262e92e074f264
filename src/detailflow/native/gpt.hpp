// One decoding step of the AR model with its KV cache (paper Sec. 3.4): class and tokens in, logits of the next tokens out.
#pragma once
#include "layers.hpp"

namespace detailflow {

struct Sizes {  // as GPTConfig names them; Python fills the same structure
    int32_t width, depth, heads, hidden, codebook_size, num_tokens, group_size, causal_tokens, null_class;
};

template <class T> struct Block {
    const T* attention_norm;
    Linear<T> qkv, proj;
    const T* mlp_norm;
    Linear<T> gate, up, down;
};

template <class T> class GPT {
public:
    // `weights`: class, token and mask embedding; attention norm, qkv, proj, MLP norm, gate, up, down of each block; norm, head.
    // `rotation` (num_tokens, head size / 2, 2): cosine and sine. `rows`: sequences, each with its class.
    GPT(const Sizes& sizes, const void* const* weights, const float* rotation, const int64_t* classes, int rows, int threads)
        : sizes(sizes), rotation(rotation), classes(classes, classes + rows), rows(rows), threads(threads),
          head_size(sizes.width / sizes.heads), length((sizes.num_tokens + LANES - 1) / LANES * LANES),
          keys(std::size_t(sizes.depth) * rows * sizes.width * length), values(keys.size()) {
        auto next = [&] { return static_cast<const T*>(*weights++); };
        auto linear = [&](int out, int in) { return Linear<T>{next(), out, in}; };
        const int width = sizes.width, hidden = sizes.hidden;
        class_embedding = next(), token_embedding = next(), mask_embedding = next();
        for (int i = 0; i < sizes.depth; i++) {
            Block<T> block;
            block.attention_norm = next();
            block.qkv = linear(3 * width, width), block.proj = linear(width, width);
            block.mlp_norm = next();
            block.gate = linear(hidden, width), block.up = linear(hidden, width), block.down = linear(width, hidden);
            blocks.push_back(block);
        }
        norm = next(), head = linear(sizes.codebook_size, width);
    }

    // tokens (rows, num_tokens), as far as the positions from `start` to `end` need them → logits (rows, end − start, codes).
    // One decoding step, or many at once for tokens that are known: each position attends to its own and earlier steps.
    void step(const int64_t* tokens, int start, int end, float* logits) {
        const int steps = end - start, count = rows * steps, width = sizes.width, hidden = sizes.hidden;
        x.resize(std::size_t(count) * width), normed.resize(x.size()), attended.resize(x.size());
        qkv.resize(3 * x.size()), gate.resize(std::size_t(count) * hidden), up.resize(gate.size());
        gated.resize(gate.size());
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < steps; i++) embed(r, start + i, tokens, &x[(std::size_t(r) * steps + i) * width]);
        for (int layer = 0; layer < sizes.depth; layer++) {
            const Block<T>& block = blocks[layer];
            rms_norm(x.data(), block.attention_norm, count, width, normed.data(), threads);
            product(normed.data(), count, block.qkv, qkv.data(), false, threads);
            attention(layer, start, end);
            product(attended.data(), count, block.proj, x.data(), true, threads);
            rms_norm(x.data(), block.mlp_norm, count, width, normed.data(), threads);
            product(normed.data(), count, block.gate, gate.data(), false, threads);
            product(normed.data(), count, block.up, up.data(), false, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && gate.size() > FEWEST_NUMBERS)
            for (std::size_t i = 0; i < gate.size(); i += LANES) {  // SwiGLU: silu(gate) · up
                Vector g = load(&gate[i]), value = g / (1.0f + exp(-g)) * load(&up[i]);
                store(&gated[i], value);
            }
            product(gated.data(), count, block.down, x.data(), true, threads);
        }
        rms_norm(x.data(), norm, count, width, normed.data(), threads);
        product(normed.data(), count, head, logits, false, threads);
    }

private:
    // Position i of [class, z_1 … z_c, m_1 … m_{g−1}, z_{c+1} … z_{N−g}] (docs/method.md#ar-model).
    void embed(int row, int position, const int64_t* tokens, float* to) const {
        const int c = sizes.causal_tokens, g = sizes.group_size, width = sizes.width;
        const int64_t* ids = tokens + std::size_t(row) * sizes.num_tokens;
        const T* from;
        if (position == 0) from = class_embedding + classes[row] * width;
        else if (position <= c) from = token_embedding + ids[position - 1] * width;
        else if (position < c + g) from = mask_embedding + std::size_t(position - c - 1) * width;
        else from = token_embedding + ids[position - g] * width;
        for (int i = 0; i < width; i++) to[i] = to_float(from[i]);
    }

    // Turn queries and keys by their position, put keys and values into the cache, attend to all that is there.
    void attention(int layer, int start, int end) {
        const int steps = end - start, width = sizes.width;
        const int scattered = 64;  // writing a key takes about as long as reading so many positions
        const bool several = threads > 1 && std::size_t(rows) * steps * (end + scattered) * width > FEWEST_FOR_THREADS / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (several)
        for (int both = 0; both < rows * sizes.heads; both++) {
            const int row = both / sizes.heads, offset = both % sizes.heads * head_size;
            const std::size_t at = ((std::size_t(layer) * rows + row) * sizes.heads + both % sizes.heads) * head_size * length;
            T *key_cache = &keys[at], *value_cache = &values[at];
            float* first = &qkv[std::size_t(row) * steps * 3 * width + offset];
            for (int i = 0; i < steps; i++) {
                float *q = first + std::size_t(i) * 3 * width, *k = q + width, *v = k + width;
                const float* turn = rotation + std::size_t(start + i) * head_size;
                for (int d = 0; d < head_size; d += 2) {
                    const float c = turn[d], s = turn[d + 1], q0 = q[d], q1 = q[d + 1];
                    q[d] = q0 * c - q1 * s, q[d + 1] = q0 * s + q1 * c;
                    store(key_cache + std::size_t(d) * length + start + i, k[d] * c - k[d + 1] * s);
                    store(key_cache + std::size_t(d + 1) * length + start + i, k[d] * s + k[d + 1] * c);
                }
                T* value = value_cache + std::size_t(start + i) * head_size;
                for (int d = 0; d < head_size; d += LANES) store(value + d, load(v + d));
            }
            static thread_local Array<float> scores;
            scores.resize(std::size_t(8) * length);
            T* out = &attended[std::size_t(row) * steps * width + offset];
            for (int from = start, until; from < end; from = until) {
                until = std::min(end, step_end(from));
                for (int i = from; i < until;) {
                    auto some = [&](auto queries) {
                        constexpr int Q = decltype(queries)::value;
                        attend<Q, T>(first + std::size_t(i - start) * 3 * width, 3 * std::size_t(width), key_cache,
                                     value_cache, length, head_size, until, out + std::size_t(i - start) * width, width,
                                     scores.data());
                        i += Q;
                    };
                    if (until - i >= 8) some(std::integral_constant<int, 8>());
                    else if (until - i >= 4) some(std::integral_constant<int, 4>());
                    else some(std::integral_constant<int, 1>());
                }
            }
        }
    }

    // The first position after the decoding step that `position` belongs to: single tokens first, then groups.
    int step_end(int position) const {
        const int c = sizes.causal_tokens, g = sizes.group_size;
        return position < c ? position + 1 : c + ((position - c) / g + 1) * g;
    }

    const Sizes sizes;
    const float* rotation;
    const std::vector<int64_t> classes;
    const int rows, threads, head_size, length;  // length: positions of a cache, a multiple of LANES
    const T *class_embedding, *token_embedding, *mask_embedding, *norm;
    Linear<T> head;
    std::vector<Block<T>> blocks;
    Array<T> keys, values;  // (depth, rows, heads, head size, length) and (depth, rows, heads, length, head size)
    Array<float> x, qkv, gate, up;
    Array<T> normed, attended, gated;
};

}  // namespace detailflow
