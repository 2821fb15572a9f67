// The selective scan for processors: the recurrence itself, position by position, sixteen channels at once with all
// their states in registers. See selective_scan.py for the formulas and selective_scan_cpp.py for the shapes.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;   // channels at once: a register of AVX-512, two of AVX2, four of NEON
constexpr int kChunk = 64;   // positions between the states that the forward pass keeps for the backward pass

using Lanes = float[kLanes];

// exp(x) for x <= 0, without a branch, so that compilers vectorise loops over it; relative error below 3e-7.
inline float exp_negative(float x) {
    x = x < -87.f ? -87.f : x;
    const float k = static_cast<float>(static_cast<int>(x * 1.44269504f - 0.5f));  // rounds, as the product is <= 0
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;                   // |r| <= ln 2 / 2
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.f;
    const int bits = (static_cast<int>(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// Sixteen channels of one sequence, or fewer at the end of a group.
struct Block {
    const float *u, *delta;  // (L, E) from the first channel on
    int64_t stride;          // E
    int width;

    void load(const float* from, int64_t t, Lanes& to) const {
        const float* row = from + t * stride;
        if (width == kLanes) {
            for (int j = 0; j < kLanes; ++j) to[j] = row[j];
        } else {
            for (int j = 0; j < kLanes; ++j) to[j] = j < width ? row[j] : 0.f;
        }
    }

    void store(const Lanes& from, float* to, int64_t t) const {
        float* row = to + t * stride;
        for (int j = 0; j < width; ++j) row[j] = from[j];
    }
};

template <int N>
void load_states(const float* A, int64_t first, int width, Lanes (&a)[N]) {  // (E, N) -> states first
    for (int n = 0; n < N; ++n)
        for (int j = 0; j < kLanes; ++j) a[n][j] = j < width ? A[(first + j) * N + n] : 0.f;
}

template <int N>
void forward_block(const Block& block, const Lanes (&a)[N], const float* B, const float* C, int64_t length,
                   Lanes (&h)[N], float* y, float* starts) {
    Lanes x, d, out;
    for (int64_t t = 0; t < length; ++t) {
        if (starts != nullptr && t % kChunk == 0) {
            std::memcpy(starts, h, sizeof h);
            starts += N * kLanes;
        }
        block.load(block.u, t, x);
        block.load(block.delta, t, d);
        for (int j = 0; j < kLanes; ++j) {
            x[j] *= d[j];
            out[j] = 0.f;
        }
        for (int n = 0; n < N; ++n) {
            const float b = B[t * N + n], c = C[t * N + n];
            for (int j = 0; j < kLanes; ++j) {
                h[n][j] = h[n][j] * exp_negative(d[j] * a[n][j]) + x[j] * b;
                out[j] += h[n][j] * c;
            }
        }
        block.store(out, y, t);
    }
}

// `g` comes in as the gradient of the state behind the last position. dB and dC are added to.
template <int N>
void backward_block(const Block& block, const Lanes (&a)[N], const float* B, const float* C, const float* dy,
                    int64_t length, const float* starts, Lanes (&g)[N], float* du, float* ddelta, Lanes (&da)[N],
                    float* dB, float* dC) {
    static thread_local Lanes before[kChunk + 1][N], decays[kChunk][N];
    Lanes u, d, out, through, dd;
    for (int64_t chunk = (length - 1) / kChunk; chunk >= 0; --chunk) {
        const int64_t first = chunk * kChunk;
        const int size = static_cast<int>(std::min<int64_t>(kChunk, length - first));
        std::memcpy(before[0], starts + chunk * N * kLanes, sizeof before[0]);
        for (int i = 0; i < size; ++i) {
            const int64_t t = first + i;
            block.load(block.u, t, u);
            block.load(block.delta, t, d);
            for (int n = 0; n < N; ++n) {
                const float b = B[t * N + n];
                for (int j = 0; j < kLanes; ++j) {
                    decays[i][n][j] = exp_negative(d[j] * a[n][j]);
                    before[i + 1][n][j] = before[i][n][j] * decays[i][n][j] + u[j] * d[j] * b;
                }
            }
        }
        for (int i = size - 1; i >= 0; --i) {
            const int64_t t = first + i;
            block.load(block.u, t, u);
            block.load(block.delta, t, d);
            block.load(dy, t, out);
            for (int j = 0; j < kLanes; ++j) through[j] = dd[j] = 0.f;
            for (int n = 0; n < N; ++n) {
                const float b = B[t * N + n], c = C[t * N + n];
                float db = 0.f, dc = 0.f;
#pragma omp simd reduction(+ : db, dc)
                for (int j = 0; j < kLanes; ++j) {
                    dc += before[i + 1][n][j] * out[j];
                    g[n][j] += c * out[j];
                    db += g[n][j] * (u[j] * d[j]);
                    through[j] += g[n][j] * b;
                    g[n][j] *= decays[i][n][j];
                    const float exponent = g[n][j] * before[i][n][j];  // gradient of d * a
                    dd[j] += exponent * a[n][j];
                    da[n][j] += exponent * d[j];
                }
                dB[t * N + n] += db;
                dC[t * N + n] += dc;
            }
            for (int j = 0; j < kLanes; ++j) {
                dd[j] += through[j] * u[j];
                through[j] *= d[j];
            }
            block.store(through, du, t);
            block.store(dd, ddelta, t);
        }
    }
}

struct Shape {
    int64_t batch, length, dim, groups;
    int64_t group_dim = dim / groups, blocks = (group_dim + kLanes - 1) / kLanes;
    int64_t chunks = (length + kChunk - 1) / kChunk;
};

template <int N>
void forward_all(const Shape& s, const float* u, const float* delta, const float* A, const float* B, const float* C,
                 float* y, float* last, float* starts, int threads) {
    const int64_t tasks = s.batch * s.groups * s.blocks;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t k = task % s.blocks, row = task / s.blocks, group = row % s.groups, b = row / s.groups;
        const int64_t e = group * s.group_dim + k * kLanes, at = b * s.length * s.dim + e;
        const int width = static_cast<int>(std::min<int64_t>(kLanes, s.group_dim - k * kLanes));
        Lanes a[N], h[N] = {};
        load_states<N>(A, e, width, a);
        const Block block{u + at, delta + at, s.dim, width};
        forward_block<N>(block, a, B + row * s.length * N, C + row * s.length * N, s.length, h, y + at,
                         starts == nullptr ? nullptr : starts + task * s.chunks * N * kLanes);
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < width; ++j) last[(b * s.dim + e + j) * N + n] = h[n][j];
    }
}

template <int N>
void backward_all(const Shape& s, const float* dy, const float* dlast, const float* u, const float* delta,
                  const float* A, const float* B, const float* C, const float* starts, float* du, float* ddelta,
                  float* dA, float* dB, float* dC, int threads) {
    const int64_t rows = s.batch * s.groups;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {  // the blocks of a group add to the same dB and dC: one after the other
        const int64_t group = row % s.groups, b = row / s.groups, place = row * s.length * N;
        for (int64_t k = 0; k < s.blocks; ++k) {
            const int64_t e = group * s.group_dim + k * kLanes, at = b * s.length * s.dim + e;
            const int width = static_cast<int>(std::min<int64_t>(kLanes, s.group_dim - k * kLanes));
            Lanes a[N], g[N], da[N] = {};
            load_states<N>(A, e, width, a);
            load_states<N>(dlast + b * s.dim * N, e, width, g);
            const Block block{u + at, delta + at, s.dim, width};
            backward_block<N>(block, a, B + place, C + place, dy + at, s.length,
                              starts + (row * s.blocks + k) * s.chunks * N * kLanes, g, du + at, ddelta + at, da,
                              dB + place, dC + place);
            for (int n = 0; n < N; ++n)
                for (int j = 0; j < width; ++j) dA[(b * s.dim + e + j) * N + n] = da[n][j];
        }
    }
}

}  // namespace

// All arrays are contiguous: u, delta, y (batch, length, dim), A (dim, states), B, C (batch, groups, length, states),
// last (batch, dim, states), starts (batch * groups * blocks * chunks, states, kLanes) or null; gradients like what they
// are the gradients of, but dA (batch, dim, states). dB and dC must come in as zeros. `states` is 8 or 16.
extern "C" void vishub_scan_forward(
    const float* u, const float* delta, const float* A, const float* B, const float* C, float* y, float* last,
    float* starts, int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t states, int threads) {
    const Shape s{batch, length, dim, groups};
    (states == 8 ? forward_all<8> : forward_all<16>)(s, u, delta, A, B, C, y, last, starts, threads);
}

extern "C" void vishub_scan_backward(
    const float* dy, const float* dlast, const float* u, const float* delta, const float* A, const float* B,
    const float* C, const float* starts, float* du, float* ddelta, float* dA, float* dB, float* dC, int64_t batch,
    int64_t length, int64_t dim, int64_t groups, int64_t states, int threads) {
    const Shape s{batch, length, dim, groups};
    (states == 8 ? backward_all<8> : backward_all<16>)(
        s, dy, dlast, u, delta, A, B, C, starts, du, ddelta, dA, dB, dC, threads);
}
