/* Batch-norm, shortcut and ReLU together, forward and backward, for maps in fp32 or bf16.

   Maps [N, H, W, C] are seen as [rows, width]. A row is one position, or several where the channels of one don't fill
   vectors: 4 positions of 20 channels make 80 numbers, which are 5 vectors of 16.

   The first `split` rows are the batch's own, the others those of memory samples. Each part is normalized by its own
   mean and variance or by the running ones. A chunk is a few rows, which stay in the first-level cache while they are
   read twice; its sums are put together with those of the other chunks in fp64. So every number is computed in the same
   order for any number of threads, and a thread finds most rows in its own cache, where the convolution left them. */

#include <math.h>

#include "vectors.h"

enum { CHUNK = 32, TOGETHER = 4 }; /* rows of a chunk; vectors of a row that are summed up together */
enum { OWN = 1, MOVES = 2 };       /* how a part is normalized: by its own statistics; and the running ones follow */

typedef struct {
    long rows, split, width, channels;
    int relu, modes[2];
    long first, chunks; /* chunks of the first part, and of both */
} Norm;

typedef struct {
    int part;
    long from, until;
} Rows;

static Norm norm_of(const long *sizes) {
    Norm n = {sizes[0], sizes[1], sizes[2], sizes[3], (int)sizes[5], {(int)sizes[6], (int)sizes[7]}, 0, 0};
    n.first = (n.split + CHUNK - 1) / CHUNK;
    n.chunks = n.first + (n.rows - n.split + CHUNK - 1) / CHUNK;
    return n;
}

INLINE Rows rows_of(Norm n, long chunk) {
    int part = chunk >= n.first;
    long from = part ? n.split + (chunk - n.first) * CHUNK : chunk * CHUNK;
    return (Rows){part, from, at_most(from + CHUNK, part ? n.rows : n.split)};
}

/* Where a chunk's sums stand: [chunks, 2, width]. */
INLINE float *sums_of(Norm n, float *sums, long chunk, int which) { return sums + (chunk * 2 + which) * n.width; }

#define FOR_VECTORS(width) \
    for (long at = 0, count = at_most(LANES, width); at < width; at += LANES, count = at_most(LANES, width - at))

/* Calls `action(at, vectors)` for a few vectors of a row at a time. */
#define FOR_SOME_VECTORS(width, action) \
    for (long at = 0; at < width; at += TOGETHER * LANES) { \
        if (width - at >= TOGETHER * LANES) action(at, TOGETHER); \
        else \
            for (long here = at; here < width; here += LANES) action(here, 1); \
    }

/* Mean and sum of squared distances from it, of the rows of a chunk, for `vectors` vectors from `at` on. */
INLINE void moments(Norm n, int half, Rows rows, const void *x, long at, int vectors, float *means, float *squares) {
    vec mean[TOGETHER] = {{0}}, square[TOGETHER] = {{0}};
    for (long row = rows.from; row < rows.until; row++)
        for (int v = 0; v < vectors; v++) {
            long place = at + v * LANES;
            mean[v] += load_any(half, x, row * n.width + place, n.width - place);
        }
    for (int v = 0; v < vectors; v++) mean[v] /= (float)(rows.until - rows.from);
    for (long row = rows.from; row < rows.until; row++)
        for (int v = 0; v < vectors; v++) {
            long place = at + v * LANES;
            vec distance = load_any(half, x, row * n.width + place, n.width - place) - mean[v];
            square[v] += distance * distance;
        }
    for (int v = 0; v < vectors; v++) {
        long place = at + v * LANES;
        store(means + place, mean[v], n.width - place);
        store(squares + place, square[v], n.width - place);
    }
}

typedef struct {
    double size, mean[LANES], square[LANES]; /* square: the sum of squared distances from the mean */
} Moments;

/* Runs `action` for all chunks of a part and, with the index `i`, for `count` channels of a row at `base`. */
#define FOR_SUMS(n, part, channel, count, action) \
    for (long chunk = part ? n.first : 0; chunk < (part ? n.chunks : n.first); chunk++) { \
        Rows rows = rows_of(n, chunk); \
        double weight = rows.until - rows.from; \
        const float *one = sums_of(n, sums, chunk, 0), *other = sums_of(n, sums, chunk, 1); \
        for (long base = channel; base < n.width; base += n.channels) \
            for (long i = 0; i < count; i++) { action; } \
    }

/* Of some channels of a part, from the moments of its chunks: Chan, Golub, LeVeque 1979. */
INLINE Moments together(Norm n, int part, long channel, long count, float *sums) {
    Moments all = {(part ? n.rows - n.split : n.split) * (n.width / n.channels), {0}, {0}};
    FOR_SUMS(n, part, channel, count, all.mean[i] += weight * one[base + i]; (void)other)
    for (long i = 0; i < count; i++) all.mean[i] /= all.size;
    FOR_SUMS(n, part, channel, count, double distance = one[base + i] - all.mean[i];
             all.square[i] += other[base + i] + weight * distance * distance)
    return all;
}

/* Every thread calls this; `factor` and `shift` are [2, width], `mean` and `scale` [2, C], 1 / the standard deviation as
   the scale. */
INLINE void forward(Norm n, int half, float epsilon, float momentum, const void *x, const void *shortcut,
                    const float *weight, const float *bias, float *running_mean, float *running_variance, void *y,
                    float *mean, float *scale, float *factor, float *shift, float *sums) {
    if ((n.modes[0] | n.modes[1]) & OWN) {
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < n.chunks; chunk++) {
            Rows rows = rows_of(n, chunk);
#define MOMENTS(at, vectors) \
    moments(n, half, rows, x, at, vectors, sums_of(n, sums, chunk, 0), sums_of(n, sums, chunk, 1))
            if (n.modes[rows.part] & OWN) FOR_SOME_VECTORS(n.width, MOMENTS)
        }
    }
#pragma omp for schedule(static)
    for (long channel = 0; channel < n.channels; channel += LANES)
        for (int part = 0; part < (n.split < n.rows ? 2 : 1); part++) {
            Moments all;
            long count = at_most(LANES, n.channels - channel);
            if (n.modes[part] & OWN) all = together(n, part, channel, count, sums);
            for (long i = 0; i < count; i++) {
                long c = channel + i, place = part * n.channels + c;
                double center = running_mean[c], variance = running_variance[c];
                if (n.modes[part] & OWN) center = all.mean[i], variance = all.square[i] / all.size;
                if (n.modes[part] & MOVES) {
                    running_mean[c] += momentum * ((float)center - running_mean[c]);
                    running_variance[c] += momentum * ((float)(all.square[i] / (all.size - 1)) - running_variance[c]);
                }
                mean[place] = center;
                scale[place] = 1 / sqrt(variance + epsilon);
                for (long at = c; at < n.width; at += n.channels) {
                    factor[part * n.width + at] = weight[c] * scale[place];
                    shift[part * n.width + at] = bias[c] - mean[place] * weight[c] * scale[place];
                }
            }
        }
#pragma omp for schedule(static)
    for (long chunk = 0; chunk < n.chunks; chunk++) {
        Rows rows = rows_of(n, chunk);
        const float *factors = factor + rows.part * n.width, *shifts = shift + rows.part * n.width;
        for (long row = rows.from; row < rows.until; row++)
            FOR_VECTORS(n.width) {
                long place = row * n.width + at;
                vec value = load_any(half, x, place, count) * load(factors + at, count) + load(shifts + at, count);
                if (shortcut) value += load_any(half, shortcut, place, count);
                store_any(half, y, place, n.relu ? positive(value) : value, count);
            }
    }
}

/* What comes to the norm from behind: through ReLU where the result was not 0. */
INLINE vec arriving(Norm n, int half, const void *gradient, const void *y, long place, long count) {
    vec g = load_any(half, gradient, place, count);
    return n.relu ? select((words)(load_any(half, y, place, count) <= 0), (vec){0}, g) : g;
}

/* Sums over the rows of a chunk: of the arriving gradient g, and of g (x - mean). */
INLINE void products(Norm n, int half, Rows rows, const void *x, const void *y, const void *gradient, const float *mean,
                     long at, int vectors, float *sums, float *along) {
    vec sum[TOGETHER] = {{0}}, product[TOGETHER] = {{0}}, center[TOGETHER];
    for (int v = 0; v < vectors; v++) center[v] = load(mean + at + v * LANES, n.width - at - v * LANES);
    for (long row = rows.from; row < rows.until; row++)
        for (int v = 0; v < vectors; v++) {
            long place = row * n.width + at + v * LANES, count = n.width - at - v * LANES;
            vec g = arriving(n, half, gradient, y, place, count);
            sum[v] += g;
            product[v] += g * (load_any(half, x, place, count) - center[v]);
        }
    for (int v = 0; v < vectors; v++) {
        store(sums + at + v * LANES, sum[v], n.width - at - v * LANES);
        store(along + at + v * LANES, product[v], n.width - at - v * LANES);
    }
}

/* The gradients of x, of the shortcut (the arriving one itself), of weight and bias. With the normalized value
   z = (x - mean) scale, that of x is weight scale (g - the mean of g - z the mean of g z), without the means where the
   statistics are the running ones. `factor`, `shift`, `slope` and `center` are [2, width]. */
INLINE void backward(Norm n, int half, const void *x, const void *y, const void *gradient, const float *weight,
                     const float *mean, const float *scale, void *of_x, void *of_shortcut, float *of_weight,
                     float *of_bias, float *factor, float *shift, float *slope, float *center, float *sums) {
    int parts = n.split < n.rows ? 2 : 1;
#pragma omp for schedule(static)
    for (long at = 0; at < n.width; at++)
        for (int part = 0; part < parts; part++) center[part * n.width + at] = mean[part * n.channels + at % n.channels];
#pragma omp for schedule(static)
    for (long chunk = 0; chunk < n.chunks; chunk++) {
        Rows rows = rows_of(n, chunk);
#define PRODUCTS(at, vectors) \
    products(n, half, rows, x, y, gradient, center + rows.part * n.width, at, vectors, sums_of(n, sums, chunk, 0), \
             sums_of(n, sums, chunk, 1))
        FOR_SOME_VECTORS(n.width, PRODUCTS)
    }
#pragma omp for schedule(static)
    for (long channel = 0; channel < n.channels; channel += LANES) {
        double total[LANES] = {0}, total_along[LANES] = {0};
        long count = at_most(LANES, n.channels - channel);
        for (int part = 0; part < parts; part++) {
            double sum[LANES] = {0}, along[LANES] = {0};
            double size = (part ? n.rows - n.split : n.split) * (n.width / n.channels);
            FOR_SUMS(n, part, channel, count, sum[i] += one[base + i]; along[i] += other[base + i]; (void)weight)
            for (long i = 0; i < count; i++) {
                double unit = scale[part * n.channels + channel + i], own = n.modes[part] & OWN ? -1 / size : 0;
                double amount = weight[channel + i] * unit;
                total[i] += sum[i];
                total_along[i] += along[i] * unit;
                for (long at = part * n.width + channel + i; at < (part + 1) * n.width; at += n.channels) {
                    factor[at] = amount;
                    shift[at] = own * amount * sum[i];
                    slope[at] = own * amount * unit * unit * along[i];
                }
            }
        }
        for (long i = 0; i < count; i++) of_weight[channel + i] = total_along[i], of_bias[channel + i] = total[i];
    }
#pragma omp for schedule(static)
    for (long chunk = 0; chunk < n.chunks; chunk++) {
        Rows rows = rows_of(n, chunk);
        long here = rows.part * n.width;
        int own = n.modes[rows.part] & OWN;
        for (long row = rows.from; row < rows.until; row++)
            FOR_VECTORS(n.width) {
                long place = row * n.width + at;
                vec g = arriving(n, half, gradient, y, place, count), result = g * load(factor + here + at, count);
                if (of_shortcut) store_any(half, of_shortcut, place, g, count);
                if (own)
                    result += load(shift + here + at, count) + load(slope + here + at, count) *
                              (load_any(half, x, place, count) - load(center + here + at, count));
                store_any(half, of_x, place, result, count);
            }
    }
}

/* ---- What Python calls; `sizes` are the numbers of rows, of rows of the first part, the width of a row, the number of
   channels; bf16 or not; ReLU or not; and the modes of both parts. Of scratch memory they need width (8 + 2 chunks) numbers. ---- */

/* `shortcut` may be NULL. `statistics` [2, 2, C] is what the backward pass needs: mean and scale of both parts. */
void norm_forward(const long *sizes, int threads, float epsilon, float momentum, const void *x, const void *shortcut,
                  const float *weight, const float *bias, float *running_mean, float *running_variance, void *y,
                  float *statistics, float *scratch) {
    Norm n = norm_of(sizes);
    float *mean = statistics, *scale = mean + 2 * n.channels;
    float *factor = scratch, *shift = factor + 2 * n.width, *sums = shift + 2 * n.width;
#pragma omp parallel num_threads(threads)
#define FORWARD(half) \
    forward(n, half, epsilon, momentum, x, shortcut, weight, bias, running_mean, running_variance, y, mean, scale, factor, \
            shift, sums)
    if (sizes[4]) FORWARD(1);
    else FORWARD(0);
}

/* `of_shortcut` may be NULL. */
void norm_backward(const long *sizes, int threads, const void *x, const void *y, const void *gradient,
                   const float *weight, const float *statistics, void *of_x, void *of_shortcut, float *of_weight,
                   float *of_bias, float *scratch) {
    Norm n = norm_of(sizes);
    const float *mean = statistics, *scale = mean + 2 * n.channels;
    float *factor = scratch, *shift = factor + 2 * n.width, *slope = shift + 2 * n.width;
    float *center = slope + 2 * n.width, *sums = center + 2 * n.width;
#pragma omp parallel num_threads(threads)
#define BACKWARD(half) \
    backward(n, half, x, y, gradient, weight, mean, scale, of_x, of_shortcut, of_weight, of_bias, factor, shift, slope, \
             center, sums)
    if (sizes[4]) BACKWARD(1);
    else BACKWARD(0);
}
