/* The squared drift of vital channels from stored patterns, and its gradient, for maps [N, positions, C] in fp32 or bf16.

   Few numbers take part, so that one thread computes them; what takes time is the gradient's zeros. */

#include <stdint.h>

#include "vectors.h"

/* `sizes`: N, positions, C; the first of the M memory samples, which are the last; V vital channels; bf16 or not. */
typedef struct {
    long samples, positions, channels, first, vital, half;
} Drift;

static Drift drift_of(const long *sizes) { return (Drift){sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]}; }

/* Calls `action` for every stored number, `number`, and its place in the maps, `place`. */
#define FOR_PATTERNS(d, vital, action) \
    for (long sample = d.first, number = 0; sample < d.samples; sample++) \
        for (long v = 0; v < d.vital; v++) \
            for (long position = 0; position < d.positions; position++, number++) { \
                long place = (sample * d.positions + position) * d.channels + vital[v]; \
                action; \
            }

/* `difference` [M, V, positions]: maps - patterns; `sum`: of its squares. */
void drift_forward(const long *sizes, int threads, const void *maps, const int64_t *vital, const float *patterns,
                   float *difference, float *sum) {
    Drift d = drift_of(sizes);
    double total = 0;
    (void)threads;
    FOR_PATTERNS(d, vital, {
        float value = d.half ? widened_one(((const unsigned short *)maps)[place]) : ((const float *)maps)[place];
        difference[number] = value - patterns[number];
        total += (double)difference[number] * difference[number];
    })
    *sum = total;
}

/* The gradient of the maps for `factor`, that of the sum. */
void drift_backward(const long *sizes, int threads, const float *difference, const int64_t *vital, const float *factor,
                    void *of_maps) {
    Drift d = drift_of(sizes);
    (void)threads;
    memset(of_maps, 0, d.samples * d.positions * d.channels * (d.half ? 2 : 4));
    FOR_PATTERNS(d, vital, {
        float value = 2 * difference[number] * *factor;
        if (d.half) ((unsigned short *)of_maps)[place] = rounded_one(value);
        else ((float *)of_maps)[place] = value;
    })
}
