// Vectors of float as GCC and Clang have them on every processor, and bfloat16 numbers in memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace detailflow {

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats in a register
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE, NEON
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
struct BFloat16 { uint16_t bits; };

// Memory that begins with a cache line, so that no register is loaded from two: that takes a tenth of a step of GPT-L. It is
// not set to zero first.
template <class T> struct Aligned {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    Aligned() = default;
    template <class U> Aligned(const Aligned<U>&) {}
    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
    void deallocate(T* memory, std::size_t) { ::operator delete(memory, LINE); }
    void construct(T* at) { ::new (at) T; }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
template <class T> using Array = std::vector<T, Aligned<T>>;

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// Keep a vector in a register: compilers would rather load it again in each multiplication that it takes part in.
template <class V> inline void in_register(V& vector) {
#if defined(__x86_64__)
    asm("" : "+v"(vector));
#elif defined(__aarch64__)
    asm("" : "+w"(vector));
#endif
}

inline Vector splat(float value) { return Vector{} + value; }

inline Vector load(const float* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Vector load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

// The bits of floats, one or a vector of them → those of bfloat16: the nearest, ties to even; NaN stays NaN.
template <class Number> inline Number rounded(Number bits) {
    const Number upper = bits >> 16, nearest = (bits + 0x7fff + (upper & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? upper | 64 : nearest;
}

inline void store(BFloat16* to, Vector value) {
    const Halves halves = __builtin_convertvector(rounded((Bits)value), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline void store(float* to, float value) { *to = value; }

inline void store(BFloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = uint16_t(rounded(bits));
}

// How many rows and outputs of a product are summed up at once: about as many as registers can hold.
template <int ROWS, int OUTPUTS> struct Tile { static constexpr int rows = ROWS, outputs = OUTPUTS; };

// What one multiplication takes of a row: LANES floats, or twice as many bfloat16 numbers. `Factor` is the type of the rows that
// weights of type T are multiplied by, once they are packed.
template <class T> struct Chunk;

template <> struct Chunk<float> {
    static constexpr int SIZE = LANES, OF_TWO_ROWS = LANES == 16 ? 8 : 4;
    using Factor = float;
    using Largest = std::conditional_t<LANES == 16, Tile<2, 8>, std::conditional_t<LANES == 8, Tile<2, 4>, Tile<4, 4>>>;
    Vector numbers;
    static Chunk load(const float* from) { return {detailflow::load(from)}; }
    static Chunk spread(const float* number) { return {splat(*number)}; }
    static Vector multiply_add(Vector sum, Chunk a, Chunk b) { return sum + a.numbers * b.numbers; }
    void store(float* to) const { detailflow::store(to, numbers); }
    void keep() { in_register(numbers); }
};

#if defined(__AVX512BF16__)
template <> struct Chunk<BFloat16> {
    static constexpr int SIZE = 2 * LANES, OF_TWO_ROWS = 8;
    using Factor = BFloat16;
    using Largest = Tile<2, 8>;
    Integers pairs;
    static Chunk load(const BFloat16* from) {
        Chunk result;
        std::memcpy(&result.pairs, from, sizeof result.pairs);
        return result;
    }
    static Chunk spread(const BFloat16* pair) {
        int32_t both;
        std::memcpy(&both, pair, sizeof both);
        return {Integers{} + both};
    }
    static Vector multiply_add(Vector sum, Chunk a, Chunk b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.pairs, (__m512bh)b.pairs);
    }
    void store(BFloat16* to) const { std::memcpy(to, &pairs, sizeof pairs); }
    void keep() { in_register(pairs); }
};
#else
template <> struct Chunk<BFloat16> {  // as floats, first those of even index, then the odd ones
    static constexpr int SIZE = 2 * LANES, OF_TWO_ROWS = 4;
    using Factor = float;
    using Largest = std::conditional_t<LANES == 8, Tile<4, 2>, std::conditional_t<LANES == 16, Tile<8, 2>, Tile<4, 4>>>;
    Vector even, odd;
    static Chunk load(const BFloat16* from) {
        Integers pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        return {(Vector)(pairs << 16), (Vector)(pairs & int32_t(0xffff0000))};
    }
    static Chunk load(const float* from) { return {detailflow::load(from), detailflow::load(from + LANES)}; }
    static Vector multiply_add(Vector sum, Chunk a, Chunk b) { return sum + a.even * b.even + a.odd * b.odd; }
    void store(float* to) const { detailflow::store(to, even), detailflow::store(to + LANES, odd); }
    void keep() { in_register(even), in_register(odd); }
};
#endif
template <class T> using Factor = typename Chunk<T>::Factor;

// Sums within two vectors: each block of 2·WIDTH lanes becomes `a`'s two halves added up, then `b`'s. Half of it stays in its lanes.
template <int WIDTH, std::size_t... I> inline Vector fold(Vector a, Vector b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I & WIDTH ? LANES + I : I)...) +
           __builtin_shufflevector(a, b, int((I & WIDTH ? LANES + I : I) ^ WIDTH)...);
}

// LANES vectors → one whose lane i is the sum of vector i's lanes.
template <int COUNT = LANES> inline Vector sums(const Vector* vectors) {
    if constexpr (COUNT == 1) {
        return vectors[0];
    } else {
        Vector folded[COUNT / 2];
        for (int i = 0; i < COUNT / 2; i++)
            folded[i] = fold<COUNT / 2>(vectors[i], vectors[i + COUNT / 2], std::make_index_sequence<LANES>());
        return sums<COUNT / 2>(folded);
    }
}

inline float sum(Vector v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

inline float largest(Vector v) {
    float result = v[0];
    for (int i = 1; i < LANES; i++) result = v[i] > result ? v[i] : result;
    return result;
}

inline Vector max(Vector a, Vector b) { return a > b ? a : b; }

// eˣ within 2 units in the last place: 2ⁿ·eʳ with |r| ≤ ln 2 / 2 and a polynomial for eʳ; 0 below −87, e⁸⁸ above 88.
inline Vector exp(Vector x) {
    Vector limited = x < splat(-87.0f) ? splat(-87.0f) : (x > splat(88.0f) ? splat(88.0f) : x);
    Vector shifted = limited * 1.44269504f + 12582912.0f;  // 1.5·2²³: adding it rounds to a whole number
    Integers n = (Integers)shifted - 0x4b400000;
    Vector whole = shifted - 12582912.0f;
    Vector r = limited - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
    Vector p = splat(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    Vector result = p * (Vector)((n + 127) << 23);
    return x < splat(-87.0f) ? splat(0.0f) : result;
}

}  // namespace detailflow
