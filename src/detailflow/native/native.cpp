// What Python calls, by ctypes: see __init__.py.
#include "gpt.hpp"
#include "sampling.hpp"
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

void detailflow_end(void* generation) { delete static_cast<Generation*>(generation); }

}
