// The reads and writes of a step, and no more: what memory alone takes. And what its loops take, alone.
#include <stdint.h>

struct Tensor {
    const uint64_t* g;
    uint64_t *y, *z, *samples;
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

// Squares by row and column, the norm of the direction, the step: of an fp32 matrix, and nothing between the loops but to
// read and write what the samples take.
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

extern "C" uint64_t loops_of_step(const Tensor* tensors, int64_t count) {
    float of_all = 1e-6f;
    uint64_t all = 0;
    for (int64_t t = 0; t < count; t++) {
        const Tensor& tensor = tensors[t];
        const float* g = reinterpret_cast<const float*>(tensor.g);
        float *of_row = tensor.factors, *of_column = of_row + tensor.rows;
        for (int64_t j = 0; j < tensor.columns; j++) of_column[j] = 0;
        squares(g, tensor.rows, tensor.columns, of_row, of_column);
        all += read_all(tensor.samples, tensor.sampled);
        of_all += norm(g, tensor.rows, tensor.columns, of_row, of_column) * 1e-30f;
    }
    for (int64_t t = 0; t < count; t++) {
        const Tensor& tensor = tensors[t];
        const float* g = reinterpret_cast<const float*>(tensor.g);
        float *y = reinterpret_cast<float*>(tensor.y), *z = reinterpret_cast<float*>(tensor.z);
        for (int64_t l = 0; l < tensor.rows; l++)
            step(g + l * tensor.columns, y + l * tensor.columns, z + l * tensor.columns, tensor.columns, tensor.factors[l],
                 tensor.factors + tensor.rows, of_all);
        for (int64_t i = 0; i < tensor.kept; i++) tensor.samples[i] ^= all;
    }
    return all;
}
