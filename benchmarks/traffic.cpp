// The reads and writes of a step, and no more: what memory alone takes.
#include <stdint.h>

struct Tensor {
    const uint64_t* g;
    uint64_t *y, *z, *samples;
    int64_t words, sampled, kept;  // of each of the first three, of the samples, and of those that a step writes
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
