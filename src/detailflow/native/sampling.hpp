// Guidance and sampling: logits and one uniform number per token → codes (docs/method.md#sampling).
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "vector.hpp"

namespace detailflow {

struct Sampling {  // Python fills the same structure; top_k 0 and top_p 1 keep all codes
    double scale, temperature, top_p;
    int64_t top_k;
    int32_t guided;
};

// Put −∞ in the place of all but the `k` largest; of equal ones the first stay.
inline void keep_top_k(std::vector<float>& logits, int64_t k) {
    std::vector<float> sorted = logits;
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    const float last = sorted[k - 1];
    int64_t room = k - std::count_if(logits.begin(), logits.end(), [&](float l) { return l > last; });
    for (float& l : logits)
        if (l < last || (l == last && room-- <= 0)) l = -INFINITY;
}

// Put −∞ outside the smallest set of most likely codes whose probabilities sum to `top_p` or more.
inline void keep_nucleus(std::vector<float>& logits, double top_p) {
    std::vector<int> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    double total = 0, before = 0;
    for (float l : logits) total += std::exp(l);
    for (std::size_t i = 0; i < order.size(); i++) {
        const double probability = std::exp(logits[order[i]]) / total;
        if (i && before >= top_p) logits[order[i]] = -INFINITY;
        before += probability;
    }
}

// Draw a code; −1 if the largest logit is not finite. Changes `logits`.
inline int64_t draw(std::vector<float>& logits, double noise, const Sampling& sampling) {
    const float largest = *std::max_element(logits.begin(), logits.end());
    if (!std::isfinite(largest) || std::any_of(logits.begin(), logits.end(), [](float l) { return std::isnan(l); })) return -1;
    if (sampling.temperature == 0) return std::find(logits.begin(), logits.end(), largest) - logits.begin();
    constexpr double TINY = std::numeric_limits<float>::min();
    const float temperature = float(std::clamp(sampling.temperature, TINY, 1 / TINY));
    for (float& l : logits) l = (l - largest) / temperature;
    const int64_t count = logits.size();
    if (sampling.top_k && sampling.top_k < count) keep_top_k(logits, sampling.top_k);
    if (sampling.top_p < 1) keep_nucleus(logits, sampling.top_p);
    for (int64_t i = 0; i < count; i += LANES) store(&logits[i], exp(load(&logits[i])));  // a multiple of LANES
    double total = 0;
    for (float p : logits) total += p;
    const double threshold = std::min(noise, 1 - std::numeric_limits<double>::epsilon() / 2) * total;
    double cumulative = 0;
    for (int64_t i = 0; i < count; i++)
        if ((cumulative += logits[i]) > threshold) return i;
    return count - 1;
}

// logits (images or, guided, 2·images; steps; codes), noise and codes (images, steps) within rows of `stride` numbers.
// Returns whether all logits were finite.
inline bool sample(const float* logits, int images, int steps, int num_codes, const double* noise, std::size_t stride,
                   const Sampling& sampling, int64_t* codes, int threads) {
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && images * steps > 1) reduction(&& : finite)
    for (int i = 0; i < images * steps; i++) {
        const int image = i / steps, step = i % steps;
        const float* conditional = logits + std::size_t(i) * num_codes;
        std::vector<float> mixed(conditional, conditional + num_codes);
        if (sampling.guided) {
            const float* unconditional = conditional + std::size_t(images) * steps * num_codes;
            const float scale = float(sampling.scale);
            for (int k = 0; k < num_codes; k++) mixed[k] = unconditional[k] + scale * (mixed[k] - unconditional[k]);
        }
        const int64_t code = draw(mixed, noise[image * stride + step], sampling);
        codes[image * stride + step] = std::max<int64_t>(code, 0);
        finite = finite && code >= 0;
    }
    return finite;
}

}  // namespace detailflow
