// What Python calls, by ctypes: see __init__.py.
#include "gpt.hpp"
#include "sampling.hpp"
#include "training.hpp"
#include "vit.hpp"

using namespace detailflow;

namespace {

struct Generation {  // one batch of images on its way
    GPT<float>* full = nullptr;
    GPT<BFloat16>* half = nullptr;
    std::vector<float> logits;
    std::vector<int64_t> tokens;  // (rows, num_tokens)
    int num_tokens, num_codes, rows, threads;
    ~Generation() { delete full, delete half; }
    void step(int start, int end) {
        logits.resize(std::size_t(rows) * (end - start) * num_codes);
        if (full) full->step(tokens.data(), start, end, logits.data());
        else half->step(tokens.data(), start, end, logits.data());
    }
};

// Call `use` with a number of the weights' type; 0 without memory.
template <class Use> int by_type(int bfloat16, Use use) try {
    if (bfloat16) use(BFloat16());
    else use(float());
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

}  // namespace

extern "C" {

const char* detailflow_instructions() {
    return amx::available() ? "AMX" :
#if defined(__AVX512BF16__)
                            "AVX-512 with bfloat16";
#elif defined(__AVX512F__)
                            "AVX-512";
#elif defined(__AVX__)
                            "AVX2";
#else
                            "128-bit vectors";
#endif
}

int detailflow_has_threads() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// Sequences of class `classes[i]`, `rows` of them; null if there is not enough memory.
void* detailflow_begin(const Sizes* sizes, int bfloat16, const void* const* weights, const float* rotation,
                       const int64_t* classes, int rows, int threads) try {
    auto* made = new Generation;
    made->num_tokens = sizes->num_tokens, made->num_codes = sizes->codebook_size;
    made->rows = rows, made->threads = threads;
    made->tokens.resize(std::size_t(rows) * sizes->num_tokens);
    try {
        if (bfloat16) made->half = new GPT<BFloat16>(*sizes, weights, rotation, classes, rows, threads);
        else made->full = new GPT<float>(*sizes, weights, rotation, classes, rows, threads);
    } catch (...) {
        delete made;
        throw;
    }
    return made;
} catch (const std::bad_alloc&) {
    return nullptr;
}

// tokens (images, num_tokens), one or with guidance two sequences each → logits (rows, end − start, codes); 0 without memory.
int detailflow_step(void* generation, const int64_t* tokens, int images, int start, int end, float* logits) try {
    auto& made = *static_cast<Generation*>(generation);
    for (int row = 0; row < made.rows; row++)
        std::memcpy(&made.tokens[std::size_t(row) * made.num_tokens], tokens + std::size_t(row % images) * made.num_tokens,
                    sizeof(int64_t) * made.num_tokens);
    made.step(start, end);
    if (logits) std::memcpy(logits, made.logits.data(), sizeof(float) * made.logits.size());
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// Take a step and write the tokens drawn into `tokens`; 1, 0 without memory, −1 if a logit is not finite.
int detailflow_advance(void* generation, int64_t* tokens, const double* noise, int images, int start, int end,
                       const Sampling* sampling) try {
    auto& made = *static_cast<Generation*>(generation);
    if (!detailflow_step(generation, tokens, images, start, end, nullptr)) return 0;
    bool finite = sample(made.logits.data(), images, end - start, made.num_codes, noise + start, made.num_tokens, *sampling,
                         tokens + start, made.threads);
    return finite ? 1 : -1;
} catch (const std::bad_alloc&) {
    return 0;
}

// y (rows, out) = x (rows, in) · weightᵀ (out, in); 0 without memory.
int detailflow_product(int bfloat16, const void* x, int rows, const void* weight, int out, int in, float* y, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        product(static_cast<const T*>(x), rows, Linear<T>{static_cast<const T*>(weight), out, in}, y, false, threads);
    });
}

// See `ViT::Sequences`; 0 without memory.
int detailflow_transform(const ViTSizes* sizes, int bfloat16, const void* const* weights, float* x, int images, int length,
                         void* const* own, const void* const* past, int past_length, const uint8_t* mask, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        ViT<T>(*sizes, weights, threads).run({x, images, length, own, past, past_length, mask});
    });
}

// What follows is for training, see training.hpp. With a gradient `dy` it is the backward pass.

int detailflow_gelu(int bfloat16, const void* x, const void* dy, int64_t count, void* to, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        const T *from = static_cast<const T*>(x), *slope = static_cast<const T*>(dy);
        if (dy) gelu_backward(from, slope, count, static_cast<T*>(to), threads);
        else gelu(from, count, static_cast<T*>(to), threads);
    });
}

// to: y, or the gradients of `gate` and, as `more`, of `up`.
int detailflow_swiglu(int bfloat16, const void* gate, const void* up, const void* dy, int64_t count, void* to, void* more, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        const T *first = static_cast<const T*>(gate), *second = static_cast<const T*>(up), *slope = static_cast<const T*>(dy);
        if (dy) swiglu_backward(first, second, slope, count, static_cast<T*>(to), static_cast<T*>(more), threads);
        else swiglu(first, second, count, static_cast<T*>(to), threads);
    });
}

// x of type T → floats, `onto` those of another tensor or null; or `back`, a gradient of floats → of type T.
int detailflow_dropout(int bfloat16, const void* x, const float* onto, int back, int64_t count, float p, int64_t seed, void* to, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        if (back) dropout(static_cast<const float*>(x), nullptr, count, p, seed, static_cast<T*>(to), threads);
        else dropout(static_cast<const T*>(x), onto, count, p, seed, static_cast<float*>(to), threads);
    });
}

int detailflow_rms_norm(int bfloat16, const float* x, const float* weight, int rows, int width, void* y, float* scales, int threads) {
    return by_type(bfloat16, [&](auto number) {
        rms_norm(x, weight, rows, width, static_cast<decltype(number)*>(y), threads, scales);
    });
}

int detailflow_rms_norm_backward(int bfloat16, const float* x, const float* weight, const float* scales, const void* dy, int rows,
                                 int width, float* dx, float* parts, int threads) {
    return by_type(bfloat16, [&](auto number) {
        rms_backward(x, weight, scales, static_cast<const decltype(number)*>(dy), rows, width, dx, parts, threads);
    });
}

int detailflow_split_heads(int bfloat16, void* qkv, void* const* parts, const float* rotation, int images, int length, int heads,
                           int size, int back, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        T* const each[] = {static_cast<T*>(parts[0]), static_cast<T*>(parts[1]), static_cast<T*>(parts[2])};
        split_heads(static_cast<T*>(qkv), each, rotation, images, length, heads, size, back, threads);
    });
}

int detailflow_cross_entropy(int bfloat16, const void* logits, const int64_t* wanted, int rows, int codes, float* losses, float* logs,
                             int threads) {
    return by_type(bfloat16, [&](auto number) {
        cross_entropy(static_cast<const decltype(number)*>(logits), wanted, rows, codes, losses, logs, threads);
    });
}

int detailflow_cross_entropy_backward(int bfloat16, const void* logits, const int64_t* wanted, const float* logs, float scale,
                                      int rows, int codes, void* to, int threads) {
    return by_type(bfloat16, [&](auto number) {
        using T = decltype(number);
        cross_entropy_backward(static_cast<const T*>(logits), wanted, logs, scale, rows, codes, static_cast<T*>(to), threads);
    });
}

void detailflow_end(void* generation) { delete static_cast<Generation*>(generation); }

}
