// The reads and writes of a step, and no more: what memory alone takes. And what its loops take, alone.
#include "../ppsf_dist/kernels/cpu/element.h"

using ppsf::bits_of;
using ppsf::float_of;
using ppsf::load;

struct Tensor {
    const uint64_t* g;
    uint64_t *y, *z, *samples;     // of z, s and p0, one after the other
    int64_t words, sampled, kept;  // of each of the first three, of the samples, and of those that a step writes
    int64_t rows, columns;
    float* factors;  // memory for those of rows and columns
};

// Four parts at once: memory is faster in several places. Apart, or the compiler would not read the same twice.
__attribute__((noinline, noclone)) static uint64_t read_all(const uint64_t* from, int64_t n) {
    const int64_t part = n / 4;
    const uint64_t *a = from, *b = a + part, *c = b + part, *d = c + part;
    uint64_t all = 0;
#pragma omp simd reduction(^ : all)
    for (int64_t i = 0; i < part; i++) all ^= (a[i] ^ b[i]) ^ (c[i] ^ d[i]);
    __asm__ volatile("" ::: "memory");
    return all;
}

static void write(const uint64_t* __restrict g, uint64_t* __restrict y, uint64_t* __restrict z, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] ^= g[i], z[i] ^= g[i];
}

extern "C" uint64_t traffic_of_step(const Tensor* tensors, int64_t count) {
    uint64_t all = 0;
    // Pass 2 of a tensor after its pass 1, which has left in the cache what fits there.
    for (int64_t t = 0; t < count; t++)
        all += read_all(tensors[t].g, tensors[t].words) + read_all(tensors[t].samples, tensors[t].sampled) +
               read_all(tensors[t].g, tensors[t].words);
    for (int64_t t = 0; t < count; t++) {
        write(tensors[t].g, tensors[t].y, tensors[t].z, tensors[t].words);
        for (int64_t i = 0; i < tensors[t].kept; i++) tensors[t].samples[i] ^= all;
    }
    return all;
}

// Of an fp32 matrix: squares by row and column, Prodigy's sums over every eleventh element, the norm of the direction, and
// the step. Nothing between the loops.
static void squares(const float* g, int64_t rows, int64_t columns, float* of_row, float* of_column) {
    const int64_t apart = rows / 4;
    for (int64_t l = 0; l < apart; l++) {
        const float *g0 = g + l * columns, *g1 = g0 + apart * columns, *g2 = g1 + apart * columns, *g3 = g2 + apart * columns;
        float a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
        for (int64_t j = 0; j < columns; j++) {
            const float x0 = g0[j] * g0[j], x1 = g1[j] * g1[j], x2 = g2[j] * g2[j], x3 = g3[j] * g3[j];
            a0 += x0, a1 += x1, a2 += x2, a3 += x3;
            of_column[j] += (x0 + x1) + (x2 + x3);
        }
        of_row[l] = a0, of_row[l + apart] = a1, of_row[l + 2 * apart] = a2, of_row[l + 3 * apart] = a3;
    }
    for (int64_t l = 4 * apart; l < rows; l++) {
        float a = 0;
#pragma omp simd reduction(+ : a)
        for (int64_t j = 0; j < columns; j++) {
            const float x = g[l * columns + j] * g[l * columns + j];
            a += x, of_column[j] += x;
        }
        of_row[l] = a;
    }
}

static float norm(const float* g, int64_t rows, int64_t columns, const float* of_row, const float* of_column) {
    const int64_t apart = rows / 4;
    float all = 0;
    for (int64_t l = 0; l < apart; l++) {
        const float *g0 = g + l * columns, *g1 = g0 + apart * columns, *g2 = g1 + apart * columns, *g3 = g2 + apart * columns;
        const float r0 = of_row[l], r1 = of_row[l + apart], r2 = of_row[l + 2 * apart], r3 = of_row[l + 3 * apart];
#pragma omp simd reduction(+ : all)
        for (int64_t j = 0; j < columns; j++) {
            const float u0 = g0[j] / (r0 * of_column[j] + 1e-8f), u1 = g1[j] / (r1 * of_column[j] + 1e-8f);
            const float u2 = g2[j] / (r2 * of_column[j] + 1e-8f), u3 = g3[j] / (r3 * of_column[j] + 1e-8f);
            all += (u0 * u0 + u1 * u1) + (u2 * u2 + u3 * u3);
        }
    }
    return all;
}

static void step(const float* __restrict g, float* __restrict y, float* __restrict z, int64_t n, float of_row,
                 const float* __restrict of_column, float advance) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const float v = g[j] / (of_row * of_column[j] + 1e-8f) * advance, old = z[j];
        y[j] = y[j] + 0.01f * (old - y[j]) - 0.1f * v;
        z[j] = old - v;
    }
}

constexpr int64_t SLICE_P = 11, SAMPLES = 1024, IN_CACHE = 131072;

static float rounded(float x) {
    const uint32_t bits = bits_of(x);
    return float_of((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

static float later(uint16_t s, float g) { return rounded(rounded(load(s) * 0.99f) + g * 0.01f); }

// Instructions that gather are slower.
__attribute__((noinline, optimize("no-tree-vectorize"))) static void gather(const float* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i * SLICE_P];
}

__attribute__((noinline)) static void write_s(const float* __restrict g, int64_t n, uint16_t* __restrict s) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float sum = later(s[i], g[i]);
        s[i] = uint16_t(bits_of(sum) >> 16);
    }
}

struct Samples {
    float* z;
    uint16_t *s, *p0;
    int64_t count;

    Samples(const Tensor& tensor)
        : z(reinterpret_cast<float*>(tensor.samples)), s(nullptr), p0(nullptr), count(tensor.rows * tensor.columns / SLICE_P) {
        s = reinterpret_cast<uint16_t*>(z + count), p0 = s + count;
    }

    double sums(const float* g, int64_t first, int64_t last) const {
        double dot = 0, length = 0;
        float of_g[SAMPLES];
        for (; first < last; first += SAMPLES) {
            const int64_t n = last - first < SAMPLES ? last - first : SAMPLES;
            const float* of_z = z + first;
            const uint16_t *of_s = s + first, *of_p0 = p0 + first;
            gather(g + first * SLICE_P, n, of_g);
            float some = 0;
#pragma omp simd reduction(+ : dot, some)
            for (int64_t i = 0; i < n; i++) {
                dot += double(of_g[i] * (load(of_p0[i]) - of_z[i]));
                some += __builtin_fabsf(later(of_s[i], of_g[i]));
            }
            length += double(some);
        }
        return dot + length;
    }

    void write(const float* g, const float* new_z, int64_t first, int64_t last) const {
        float of_g[SAMPLES];
        for (; first < last; first += SAMPLES) {
            const int64_t n = last - first < SAMPLES ? last - first : SAMPLES;
            gather(g + first * SLICE_P, n, of_g);
            gather(new_z + first * SLICE_P, n, z + first);
            write_s(of_g, n, s + first);
        }
    }
};

extern "C" uint64_t loops_of_step(const Tensor* tensors, int64_t count) {
    double all = 1;
    for (int64_t t = 0; t < count; t++) {
        const Tensor& tensor = tensors[t];
        const Samples samples(tensor);
        const float* g = reinterpret_cast<const float*>(tensor.g);
        const int64_t rows = tensor.rows, columns = tensor.columns;
        const int64_t some = IN_CACHE / columns < 4 ? 4 : IN_CACHE / columns / 4 * 4;
        float *of_row = tensor.factors, *of_column = of_row + rows;
        for (int64_t j = 0; j < columns; j++) of_column[j] = 0;
        for (int64_t l = 0; l < rows; l += some) {
            const int64_t last = rows - l < some ? rows : l + some;
            squares(g + l * columns, last - l, columns, of_row + l, of_column);
            all += samples.sums(g, l * columns / SLICE_P, last * columns / SLICE_P);
        }
        all += double(norm(g, rows, columns, of_row, of_column));
    }
    const float advance = 1e-6f + float(all * 1e-30);
    for (int64_t t = 0; t < count; t++) {
        const Tensor& tensor = tensors[t];
        const Samples samples(tensor);
        const float* g = reinterpret_cast<const float*>(tensor.g);
        float *y = reinterpret_cast<float*>(tensor.y), *z = reinterpret_cast<float*>(tensor.z);
        const int64_t columns = tensor.columns;
        for (int64_t l = 0; l < tensor.rows; l++) {
            step(g + l * columns, y + l * columns, z + l * columns, columns, tensor.factors[l], tensor.factors + tensor.rows,
                 advance);
            samples.write(g, z, l * columns / SLICE_P, (l + 1) * columns / SLICE_P);
        }
    }
    return uint64_t(all);
}
