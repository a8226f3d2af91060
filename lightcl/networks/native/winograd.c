/* 3x3 convolutions by Winograd's algorithm F(4x4, 3x3), forward and backward, for maps [N, H, W, C] in fp32 or bf16.

   The algorithm and its transforms stand in ../winograd.py. Here nothing is copied to suit a library's matrix product:
   a transform writes its 36 places where the products read them, products of a few places at a time take their weights
   from a block that fits into the processor's second-level cache, and the transforms are sums, not matrix products.
   Large maps are computed a few at a time, so that their places stay in the cache as well. Maps in bf16 are widened
   where they are read and rounded where they are written; all arithmetic is in fp32.

   Every number is computed in the same order for any number of threads. */

#include "vectors.h"

#if defined(__AVX512F__)
enum { ROWS = 12 }; /* 12 x 2 sums, in 24 of 32 registers */
#elif defined(__AVX__)
enum { ROWS = 5 }; /* 5 x 2 sums, in 10 of 16 registers */
#else
enum { ROWS = 8 }; /* 8 x 2 sums, in 16 of the 32 registers of an ARM processor */
#endif

enum { TILE = 4, REACH = 6, TAPS = 9, PLACES = REACH * REACH, BLOCK = 2 * LANES, TALL = 2 * ROWS, WITHIN = TALL * BLOCK + 16 };
enum { GROUP = 128, LARGEST = 1024 }; /* tiles that are computed together; positions of a map, at most */

typedef struct {
    long maps, height, width, inputs, outputs; /* as in [N, H, W, C] and [N, H, W, C'] */
    long tiles;                                /* of all maps */
    long padded_inputs, padded_outputs;        /* channels in scratch memory, where vectors are full */
    long next_input, next_output;              /* distance of two places in scratch memory */
} Shape;

static long padded(long channels) { return (channels + LANES - 1) / LANES * LANES; }

/* Not less than `numbers`, and an odd number of cache lines: the 36 places of a tile are used together, and in a distance
   of a power of two they would fight for the same few lines of the first-level cache. */
static long apart(long numbers) { return ((numbers + 15) / 16 | 1) * 16; }

static Shape shape_of(const long *sizes) {
    Shape s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], 0, padded(sizes[3]), padded(sizes[4]), 0, 0};
    s.tiles = s.maps * (s.height / TILE) * (s.width / TILE);
    s.next_input = apart(s.tiles * s.padded_inputs);
    s.next_output = apart(s.tiles * s.padded_outputs);
    return s;
}

/* ---- Transforms along one side; `step` is the distance of an array's elements ---- */

INLINE void input_side(const vec *d, int from, vec *t, int to) { /* B^T */
    vec even = d[4 * from] - 4 * d[2 * from], odd = d[3 * from] - 4 * d[from];
    vec wide = d[4 * from] - d[2 * from], bent = 2 * (d[3 * from] - d[from]);
    t[0] = 4 * d[0] - 5 * d[2 * from] + d[4 * from];
    t[to] = even + odd;
    t[2 * to] = even - odd;
    t[3 * to] = wide + bent;
    t[4 * to] = wide - bent;
    t[5 * to] = 4 * d[from] - 5 * d[3 * from] + d[5 * from];
}

INLINE void input_side_back(const vec *t, int from, vec *d, int to) { /* B */
    vec near = t[from] + t[2 * from], far = t[3 * from] + t[4 * from];
    vec tilt = t[from] - t[2 * from], bend = t[3 * from] - t[4 * from];
    d[0] = 4 * t[0];
    d[to] = 4 * (t[5 * from] - tilt) - 2 * bend;
    d[2 * to] = -5 * t[0] - 4 * near - far;
    d[3 * to] = tilt + 2 * bend - 5 * t[5 * from];
    d[4 * to] = t[0] + near + far;
    d[5 * to] = t[5 * from];
}

INLINE void output_side(const vec *m, int from, vec *y, int to) { /* A^T */
    vec near = m[from] + m[2 * from], far = m[3 * from] + m[4 * from];
    vec tilt = m[from] - m[2 * from], bend = m[3 * from] - m[4 * from];
    y[0] = m[0] + near + far;
    y[to] = tilt + 2 * bend;
    y[2 * to] = near + 4 * far;
    y[3 * to] = tilt + 8 * bend + m[5 * from];
}

INLINE void output_side_back(const vec *y, int from, vec *m, int to) { /* A */
    vec even = y[0] + y[2 * from], odd = y[from] + y[3 * from];
    vec wide = y[0] + 4 * y[2 * from], bent = 2 * y[from] + 8 * y[3 * from];
    m[0] = y[0];
    m[to] = even + odd;
    m[2 * to] = even - odd;
    m[3 * to] = wide + bent;
    m[4 * to] = wide - bent;
    m[5 * to] = y[3 * from];
}

INLINE void weight_side(vec a, vec b, vec c, vec *r, long to) { /* G */
    vec sum = (a + c) * (-1.0f / 6), middle = b * (1.0f / 6);
    vec wide = a * (1.0f / 24) + c * (1.0f / 6), half = b * (1.0f / 12);
    r[0] = a * 0.25f;
    r[to] = sum - middle;
    r[2 * to] = sum + middle;
    r[3 * to] = wide + half;
    r[4 * to] = wide - half;
    r[5 * to] = c;
}

INLINE vec weight_row(vec a, vec b, vec c, int row) { /* one row of G */
    switch (row) {
    case 0: return a * 0.25f;
    case 1: return (a + b + c) * (-1.0f / 6);
    case 2: return (a - b + c) * (-1.0f / 6);
    case 3: return a * (1.0f / 24) + b * (1.0f / 12) + c * (1.0f / 6);
    case 4: return a * (1.0f / 24) - b * (1.0f / 12) + c * (1.0f / 6);
    default: return c;
    }
}

INLINE void weight_side_back(const vec *r, int from, vec *w, int to) { /* G^T */
    vec near = (r[from] + r[2 * from]) * (-1.0f / 6), far = r[3 * from] + r[4 * from];
    w[0] = r[0] * 0.25f + near + far * (1.0f / 24);
    w[to] = (r[2 * from] - r[from]) * (1.0f / 6) + (r[3 * from] - r[4 * from]) * (1.0f / 12);
    w[2 * to] = near + far * (1.0f / 6) + r[5 * from];
}

/* ---- Transforms of maps, one tile and one vector of channels at a time ---- */

/* What happens to a result before it is written: y * scale + shift + shortcut, and ReLU. NULL: not wanted. */
typedef struct {
    const float *scale, *shift; /* [C'] */
    const void *shortcut;       /* [N, H, W, C'] */
    int relu;
} After;

typedef struct {
    int half; /* bf16, else fp32 */
    void *map;
    long place; /* of the map's and vector's first number */
    float *places;
    long height, width, channels, next; /* `next`: the distance of two places */
    long top, left;                     /* of the tile's outputs */
    long channel, count;                /* the first channel of the vector, and how many it has */
} Tile;

INLINE long at(Tile t, long y, long x) { return t.place + (y * t.width + x) * t.channels; }

INLINE int inside(Tile t, long y, long x) { return y >= 0 && y < t.height && x >= 0 && x < t.width; }

/* Runs `transform` with the Tile `t`, for all tiles of maps [N, H, W, channels] and places [36, tiles, padded]. A task is
   one map and one vector of channels: tiles that overlap belong to one task, which runs `before` and `after`. */
#define FOR_TILES(s, half_, maps_, places_, channels_, padded_, next_, before, transform, after) \
    long rows = s.height / TILE, columns = s.width / TILE, vectors = padded_ / LANES; \
    _Pragma("omp for schedule(static) collapse(2)") \
    for (long n = 0; n < s.maps; n++) \
        for (long v = 0; v < vectors; v++) { \
            long channel = v * LANES; \
            Tile t = {half_, (void *)(maps_), n * s.height * s.width * channels_ + channel, 0, s.height, s.width, channels_, \
                      next_, 0, 0, channel, at_most(LANES, channels_ - channel)}; \
            before; \
            for (long row = 0; row < rows; row++) \
                for (long column = 0; column < columns; column++) { \
                    t.places = (float *)(places_) + ((n * rows + row) * columns + column) * padded_ + channel; \
                    t.top = row * TILE; \
                    t.left = column * TILE; \
                    transform; \
                } \
            after; \
        }

INLINE void input_tile(Tile t) {
    vec d[PLACES], half[PLACES];
    for (int i = 0; i < REACH; i++)
        for (int j = 0; j < REACH; j++) {
            long y = t.top + i - 1, x = t.left + j - 1;
            d[i * REACH + j] = inside(t, y, x) ? load_any(t.half, t.map, at(t, y, x), t.count) : (vec){0};
        }
    for (int j = 0; j < REACH; j++) input_side(d + j, REACH, half + j, REACH);
    for (int i = 0; i < REACH; i++) input_side(half + i * REACH, 1, d + i * REACH, 1);
    for (int p = 0; p < PLACES; p++) *(loose *)(t.places + p * t.next) = d[p];
}

/* The transposed of it: overlapping tiles are added up in `sum` [H, W]. */
INLINE void input_tile_back(Tile t, vec *sum) {
    vec d[PLACES], half[PLACES];
    for (int p = 0; p < PLACES; p++) d[p] = *(const loose *)(t.places + p * t.next);
    for (int i = 0; i < REACH; i++) input_side_back(d + i * REACH, 1, half + i * REACH, 1);
    for (int j = 0; j < REACH; j++) input_side_back(half + j, REACH, d + j, REACH);
    for (int i = 0; i < REACH; i++)
        for (int j = 0; j < REACH; j++) {
            long y = t.top + i - 1, x = t.left + j - 1;
            if (inside(t, y, x)) sum[y * t.width + x] += d[i * REACH + j];
        }
}

INLINE void output_tile(Tile t, After after) {
    vec m[PLACES], half[TILE * REACH], y[TILE * TILE];
    for (int p = 0; p < PLACES; p++) m[p] = *(const loose *)(t.places + p * t.next);
    for (int j = 0; j < REACH; j++) output_side(m + j, REACH, half + j, REACH);
    for (int i = 0; i < TILE; i++) output_side(half + i * REACH, 1, y + i * TILE, 1);
    if (after.scale) {
        vec scale = load(after.scale + t.channel, t.count), shift = load(after.shift + t.channel, t.count);
        for (int p = 0; p < TILE * TILE; p++) y[p] = y[p] * scale + shift;
    }
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) {
            vec value = y[i * TILE + j];
            long place = at(t, t.top + i, t.left + j);
            if (after.shortcut) value += load_any(t.half, after.shortcut, place, t.count);
            if (after.relu) value = positive(value);
            store_any(t.half, t.map, place, value, t.count);
        }
}

/* The transposed of it. */
INLINE void output_tile_back(Tile t) {
    vec y[TILE * TILE], half[TILE * REACH], m[PLACES];
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) y[i * TILE + j] = load_any(t.half, t.map, at(t, t.top + i, t.left + j), t.count);
    for (int i = 0; i < TILE; i++) output_side_back(y + i * TILE, 1, half + i * REACH, 1);
    for (int j = 0; j < REACH; j++) output_side_back(half + j, REACH, m + j, REACH);
    for (int p = 0; p < PLACES; p++) *(loose *)(t.places + p * t.next) = m[p];
}

/* Maps [N, H, W, C] and places [36, tiles, padded C], or C'. */
INLINE void input_to_places(Shape s, int half, const void *maps, float *places) {
    FOR_TILES(s, half, maps, places, s.inputs, s.padded_inputs, s.next_input, , input_tile(t), )
}

INLINE void places_to_input(Shape s, int half, const float *places, void *maps) {
    vec sum[LARGEST];
    long positions = s.height * s.width;
    FOR_TILES(
        s, half, maps, places, s.inputs, s.padded_inputs, s.next_input, memset(sum, 0, positions * sizeof(vec)),
        input_tile_back(t, sum),
        for (long i = 0; i < positions; i++) store_any(half, maps, t.place + i * t.channels, sum[i], t.count))
}

INLINE void places_to_output(Shape s, int half, const float *places, void *maps, After after) {
    FOR_TILES(s, half, maps, places, s.outputs, s.padded_outputs, s.next_output, , output_tile(t, after), )
}

INLINE void output_to_places(Shape s, int half, const void *maps, float *places) {
    FOR_TILES(s, half, maps, places, s.outputs, s.padded_outputs, s.next_output, , output_tile_back(t), )
}

/* ---- Matrix products ---- */

/* result[i, j] = sum over l of a[i, l] b[l, j], for a few i and one or two vectors of j, kept in registers. */
INLINE void corner(int rows, int vectors, long depth, const float *a, long a_row, long a_step, const float *b,
                   long b_step, float *result, long result_row) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (long l = 0; l < depth; l++) {
        vec first = load(b + l * b_step, LANES);
        vec second = vectors > 1 ? load(b + l * b_step + LANES, LANES) : first;
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float factor = a[i * a_row + l * a_step];
            sum[i][0] += factor * first;
            if (vectors > 1) sum[i][1] += factor * second;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) *(loose *)(result + i * result_row + j * LANES) = sum[i][j];
}

/* The same for any number of rows. */
INLINE void product(long rows, int vectors, long depth, const float *a, long a_row, long a_step, const float *b,
                    long b_step, float *result, long result_row) {
#define CORNER(count) \
    case count: \
        if (count <= ROWS) corner(count <= ROWS ? count : 1, vectors, depth, a, a_row, a_step, b, b_step, result, result_row); \
        break;
    long corners = (rows + ROWS - 1) / ROWS;
    for (long left = corners; left > 0; left--) { /* of about equal size */
        long count = (rows + left - 1) / left;
        switch (count) {
            CORNER(1) CORNER(2) CORNER(3) CORNER(4) CORNER(5) CORNER(6)
            CORNER(7) CORNER(8) CORNER(9) CORNER(10) CORNER(11) CORNER(12)
        }
        rows -= count;
        a += count * a_row;
        result += count * result_row;
    }
#undef CORNER
}

static void product_1(long rows, long depth, const float *a, long a_row, long a_step, const float *b, long b_step,
                      float *result, long result_row) {
    product(rows, 1, depth, a, a_row, a_step, b, b_step, result, result_row);
}

static void product_2(long rows, long depth, const float *a, long a_row, long a_step, const float *b, long b_step,
                      float *result, long result_row) {
    product(rows, 2, depth, a, a_row, a_step, b, b_step, result, result_row);
}

/* The weights' places of one row, [6, depth, vectors], of weights [9, depth, columns] of which a block of columns is
   wanted. `tap` and `step` are the distances of taps and of neighbors in depth. */
static void weights_to_places(int row, int vectors, long depth, const float *weights, long tap, long step, long count,
                              float *places) {
    long next = depth * vectors * LANES;
    for (long l = 0; l < depth; l++)
        for (int j = 0; j < vectors; j++) {
            const float *from = weights + l * step + j * LANES;
            vec side[3], r[REACH];
            for (int x = 0; x < 3; x++)
                side[x] = weight_row(load(from + x * tap, count - j * LANES), load(from + (3 + x) * tap, count - j * LANES),
                                     load(from + (6 + x) * tap, count - j * LANES), row);
            weight_side(side[0], side[1], side[2], r, 1);
            for (int p = 0; p < REACH; p++) *(loose *)(places + p * next + (l * vectors + j) * LANES) = r[p];
        }
}

/* results[p] = factors[p] x weights[p] for the 36 places p: [tiles, depth] x [depth, columns]. A task is a row of places
   and a block of columns, whose transformed weights it keeps in `block`. */
static void products_with_weights(long tiles, long depth, long padded_depth, long columns, long padded_columns,
                                  const float *factors, const float *weights, long tap, long step, float *results,
                                  float *block) {
    long next_factor = apart(tiles * padded_depth), next_result = apart(tiles * padded_columns);
    long blocks = (padded_columns + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic) collapse(2)
    for (long number = 0; number < blocks; number++)
        for (int row = 0; row < REACH; row++) {
            long start = number * BLOCK;
            int vectors = padded_columns - start >= BLOCK ? 2 : 1;
            weights_to_places(row, vectors, depth, weights + start, tap, step, columns - start, block);
            for (int p = 0; p < REACH; p++) {
                long place = row * REACH + p;
                (vectors == 2 ? product_2 : product_1)(
                    tiles, depth, factors + place * next_factor, padded_depth, 1,
                    block + p * depth * vectors * LANES, vectors * LANES,
                    results + place * next_result + start, padded_columns);
            }
        }
}

/* The gradient of the weights [C', 9, C], added to what is there where `more`. A task is a block of outputs and one of
   inputs: all of its 36 products are in `block`. */
static void weight_gradient(Shape s, const float *outputs, const float *inputs, float *gradient, int more, float *block) {
    long high = (s.outputs + TALL - 1) / TALL, wide = (s.padded_inputs + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic) collapse(2)
    for (long number = 0; number < high; number++)
        for (long column = 0; column < wide; column++) {
            long first = number * TALL, start = column * BLOCK;
            long rows = at_most(TALL, s.outputs - first);
            int vectors = s.padded_inputs - start >= BLOCK ? 2 : 1;
            for (int p = 0; p < PLACES; p++)
                (vectors == 2 ? product_2 : product_1)(
                    rows, s.tiles, outputs + p * s.next_output + first, 1, s.padded_outputs,
                    inputs + p * s.next_input + start, s.padded_inputs, block + p * WITHIN, BLOCK);
            for (long i = 0; i < rows; i++)
                for (int j = 0; j < vectors; j++) {
                    vec u[PLACES], half[3 * REACH], w[TAPS];
                    for (int p = 0; p < PLACES; p++) u[p] = *(const loose *)(block + p * WITHIN + i * BLOCK + j * LANES);
                    for (int y = 0; y < REACH; y++) weight_side_back(u + y, REACH, half + y, REACH);
                    for (int y = 0; y < 3; y++) weight_side_back(half + y * REACH, 1, w + y * 3, 1);
                    long channel = start + j * LANES;
                    for (int y = 0; y < TAPS; y++) {
                        float *place = gradient + ((first + i) * TAPS + y) * s.inputs + channel;
                        store(place, more ? load(place, s.inputs - channel) + w[y] : w[y], s.inputs - channel);
                    }
                }
        }
}

/* Weights [C', 9, C] -> [9, C, padded C'], a square of numbers at a time. */
static void turn(Shape s, const float *weights, float *turned) {
#pragma omp for schedule(static) collapse(2)
    for (long k = 0; k < s.padded_outputs; k += LANES)
        for (long tap = 0; tap < TAPS; tap++)
            for (long start = 0; start < s.inputs; start += LANES) {
                long count = at_most(LANES, s.inputs - start);
                vec square[LANES];
                for (long i = 0; i < LANES; i++)
                    square[i] = k + i < s.outputs ? load(weights + ((k + i) * TAPS + tap) * s.inputs + start, count) : (vec){0};
                transpose(square);
                for (long c = 0; c < count; c++)
                    *(loose *)(turned + (tap * s.inputs + start + c) * s.padded_outputs + k) = square[c];
            }
}

/* ---- What Python calls; `sizes` are N, H, W, C and C', and 1 where the maps are in bf16 ---- */

static long block_size(Shape s) {
    long weights = REACH * (s.inputs > s.outputs ? s.inputs : s.outputs) * BLOCK, gradient = PLACES * WITHIN;
    return weights > gradient ? weights : gradient;
}

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* `s` for the maps that are computed together, from map `first` on. */
INLINE Shape group_of(const long *sizes, long first) {
    long tiles = sizes[1] / TILE * (sizes[2] / TILE), together = GROUP / tiles > 1 ? GROUP / tiles : 1;
    long group[] = {at_most(together, sizes[0] - first), sizes[1], sizes[2], sizes[3], sizes[4]};
    return shape_of(group);
}

/* Where map `first` begins. */
INLINE const void *from_map(const void *maps, const long *sizes, long first, long channels) {
    return (const char *)maps + first * sizes[1] * sizes[2] * channels * (sizes[5] ? 2 : 4);
}

/* Numbers of scratch memory for a forward or a backward pass. */
long winograd_scratch(const long *sizes, int backward, int threads) {
    Shape s = group_of(sizes, 0);
    long inputs = PLACES * s.next_input, outputs = PLACES * s.next_output;
    return inputs + outputs + (backward ? 0 : TAPS * s.inputs * s.padded_outputs) + threads * block_size(s);
}

/* By one of the threads that share the work; `half` is a constant where it is called. */
INLINE void forward(const long *sizes, int half, const void *maps, const float *weights, After after, void *result,
                    float *scratch) {
    Shape whole = group_of(sizes, 0);
    float *inputs = scratch, *outputs = inputs + PLACES * whole.next_input;
    float *turned = outputs + PLACES * whole.next_output;
    float *block = turned + TAPS * whole.inputs * whole.padded_outputs + THREAD * block_size(whole);
    turn(whole, weights, turned);
    for (long first = 0; first < sizes[0]; first += whole.maps) {
        Shape s = group_of(sizes, first);
        After here = after;
        if (after.shortcut) here.shortcut = from_map(after.shortcut, sizes, first, s.outputs);
        input_to_places(s, half, from_map(maps, sizes, first, s.inputs), inputs);
        products_with_weights(s.tiles, s.inputs, s.padded_inputs, s.padded_outputs, s.padded_outputs, inputs, turned,
                              s.inputs * s.padded_outputs, s.padded_outputs, outputs, block);
        places_to_output(s, half, outputs, (void *)from_map(result, sizes, first, s.outputs), here);
    }
}

INLINE void backward(const long *sizes, int half, const void *maps, const float *weights, const void *gradient,
                     void *of_maps, float *of_weights, float *scratch) {
    Shape whole = group_of(sizes, 0);
    float *inputs = scratch, *outputs = inputs + PLACES * whole.next_input;
    float *block = outputs + PLACES * whole.next_output + THREAD * block_size(whole);
    for (long first = 0; first < sizes[0]; first += whole.maps) {
        Shape s = group_of(sizes, first);
        output_to_places(s, half, from_map(gradient, sizes, first, s.outputs), outputs);
        if (of_weights) {
            input_to_places(s, half, from_map(maps, sizes, first, s.inputs), inputs);
            weight_gradient(s, outputs, inputs, of_weights, first > 0, block);
        }
        if (of_maps) {
            products_with_weights(s.tiles, s.outputs, s.padded_outputs, s.inputs, s.padded_inputs, outputs, weights,
                                  s.inputs, TAPS * s.inputs, inputs, block);
            places_to_input(s, half, inputs, (void *)from_map(of_maps, sizes, first, s.inputs));
        }
    }
}

/* `scale` and `shift`, or `shortcut`, may be NULL: not wanted. */
void winograd_forward(const long *sizes, int threads, int relu, const void *maps, const float *weights, const float *scale,
                      const float *shift, const void *shortcut, void *result, float *scratch) {
    After after = {scale, shift, shortcut, relu};
#pragma omp parallel num_threads(threads)
    if (sizes[5]) forward(sizes, 1, maps, weights, after, result, scratch);
    else forward(sizes, 0, maps, weights, after, result, scratch);
}

/* `of_maps` or `of_weights` may be NULL: not wanted. */
void winograd_backward(const long *sizes, int threads, const void *maps, const float *weights, const void *gradient,
                       void *of_maps, float *of_weights, float *scratch) {
#pragma omp parallel num_threads(threads)
    if (sizes[5]) backward(sizes, 1, maps, weights, gradient, of_maps, of_weights, scratch);
    else backward(sizes, 0, maps, weights, gradient, of_maps, of_weights, scratch);
}
