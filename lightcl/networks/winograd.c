/* 3x3 convolutions by Winograd's algorithm F(4x4, 3x3), forward and backward, for maps [N, H, W, C] in fp32.

   The algorithm and its transforms stand in winograd.py. Here nothing is copied to suit a library's matrix product:
   a transform writes its 36 places where the products read them, products of a few places at a time take their weights
   from a block that fits into the processor's second-level cache, and the transforms are sums, not matrix products.

   Every number is computed in the same order for any number of threads.

   Plain C with the vector types that GCC and Clang know; the width of a vector follows from the processor that it is
   compiled for. native.py compiles and loads it. */

#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12 }; /* 12 x 2 sums, in 24 of 32 registers */
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 5 }; /* 5 x 2 sums, in 10 of 16 registers */
#else
enum { LANES = 4, ROWS = 8 }; /* 8 x 2 sums, in 16 of the 32 registers of an ARM processor */
#endif

enum { TILE = 4, REACH = 6, TAPS = 9, PLACES = REACH * REACH, BLOCK = 2 * LANES, HIGH = 2 * ROWS, WITHIN = HIGH * BLOCK + 16 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* anywhere in memory */

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    long maps, height, width, inputs, outputs; /* as in [N, H, W, C] and [N, H, W, C'] */
    long tiles;                                /* of all maps */
    long padded_inputs, padded_outputs;        /* channels in scratch memory, where vectors are full */
    long next_input, next_output;              /* distance of two places in scratch memory */
} Shape;

INLINE long at_most(long a, long b) { return a < b ? a : b; }

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

/* The first `count` of a vector's numbers; the others are 0. */
INLINE vec load(const float *from, long count) {
    if (count >= LANES) return *(const loose *)from;
    vec result = {0};
    memcpy(&result, from, 4 * count);
    return result;
}

INLINE void store(float *to, vec value, long count) {
    if (count >= LANES) *(loose *)to = value;
    else memcpy(to, &value, 4 * count);
}

INLINE void add(float *to, vec value, long count) { store(to, load(to, count) + value, count); }

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

typedef struct {
    float *map; /* of these channels: [H, W, C] from the first of them on */
    float *places;
    long height, width, channels, next; /* `next`: the distance of two places */
    long top, left;                     /* of the tile's outputs */
    long count;                         /* channels of the vector */
} Tile;

INLINE float *at(Tile t, long y, long x) { return t.map + (y * t.width + x) * t.channels; }

INLINE int inside(Tile t, long y, long x) { return y >= 0 && y < t.height && x >= 0 && x < t.width; }

/* Calls `transform` for all tiles of maps [N, H, W, channels] and places [36, tiles, padded]. A task is one map and one
   vector of channels: tiles that overlap belong to one task. */
INLINE void for_tiles(Shape s, long channels, long padded, long next, float *maps, float *places,
                      void (*transform)(Tile)) {
    long rows = s.height / TILE, columns = s.width / TILE, vectors = padded / LANES;
#pragma omp for schedule(static) collapse(2)
    for (long n = 0; n < s.maps; n++)
        for (long v = 0; v < vectors; v++)
            for (long row = 0; row < rows; row++)
                for (long column = 0; column < columns; column++) {
                    long channel = v * LANES;
                    transform((Tile){maps + n * s.height * s.width * channels + channel,
                                     places + ((n * rows + row) * columns + column) * padded + channel, s.height, s.width,
                                     channels, next, row * TILE, column * TILE, at_most(LANES, channels - channel)});
                }
}

INLINE void input_to_places(Tile t) {
    vec d[PLACES], half[PLACES];
    for (int i = 0; i < REACH; i++)
        for (int j = 0; j < REACH; j++) {
            long y = t.top + i - 1, x = t.left + j - 1;
            d[i * REACH + j] = inside(t, y, x) ? load(at(t, y, x), t.count) : (vec){0};
        }
    for (int j = 0; j < REACH; j++) input_side(d + j, REACH, half + j, REACH);
    for (int i = 0; i < REACH; i++) input_side(half + i * REACH, 1, d + i * REACH, 1);
    for (int p = 0; p < PLACES; p++) *(loose *)(t.places + p * t.next) = d[p];
}

/* The transposed of it: overlapping tiles are added up. */
INLINE void places_to_input(Tile t) {
    vec d[PLACES], half[PLACES];
    if (t.top == 0 && t.left == 0) /* the map's first tile */
        for (long position = 0; position < t.height * t.width; position++)
            store(t.map + position * t.channels, (vec){0}, t.count);
    for (int p = 0; p < PLACES; p++) d[p] = *(const loose *)(t.places + p * t.next);
    for (int i = 0; i < REACH; i++) input_side_back(d + i * REACH, 1, half + i * REACH, 1);
    for (int j = 0; j < REACH; j++) input_side_back(half + j, REACH, d + j, REACH);
    for (int i = 0; i < REACH; i++)
        for (int j = 0; j < REACH; j++) {
            long y = t.top + i - 1, x = t.left + j - 1;
            if (inside(t, y, x)) add(at(t, y, x), d[i * REACH + j], t.count);
        }
}

INLINE void places_to_output(Tile t) {
    vec m[PLACES], half[TILE * REACH], y[TILE * TILE];
    for (int p = 0; p < PLACES; p++) m[p] = *(const loose *)(t.places + p * t.next);
    for (int j = 0; j < REACH; j++) output_side(m + j, REACH, half + j, REACH);
    for (int i = 0; i < TILE; i++) output_side(half + i * REACH, 1, y + i * TILE, 1);
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) store(at(t, t.top + i, t.left + j), y[i * TILE + j], t.count);
}

/* The transposed of it. */
INLINE void output_to_places(Tile t) {
    vec y[TILE * TILE], half[TILE * REACH], m[PLACES];
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) y[i * TILE + j] = load(at(t, t.top + i, t.left + j), t.count);
    for (int i = 0; i < TILE; i++) output_side_back(y + i * TILE, 1, half + i * REACH, 1);
    for (int j = 0; j < REACH; j++) output_side_back(half + j, REACH, m + j, REACH);
    for (int p = 0; p < PLACES; p++) *(loose *)(t.places + p * t.next) = m[p];
}

/* Maps [N, H, W, C] and places [36, tiles, padded C], or C'. */
INLINE void for_inputs(Shape s, const float *maps, float *places, void (*transform)(Tile)) {
    for_tiles(s, s.inputs, s.padded_inputs, s.next_input, (float *)maps, places, transform);
}

INLINE void for_outputs(Shape s, const float *maps, float *places, void (*transform)(Tile)) {
    for_tiles(s, s.outputs, s.padded_outputs, s.next_output, (float *)maps, places, transform);
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

/* The gradient of the weights [C', 9, C]. A task is a block of outputs and one of inputs: all of its 36 products are
   in `block`. */
static void weight_gradient(Shape s, const float *outputs, const float *inputs, float *gradient, float *block) {
    long high = (s.outputs + HIGH - 1) / HIGH, wide = (s.padded_inputs + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic) collapse(2)
    for (long number = 0; number < high; number++)
        for (long column = 0; column < wide; column++) {
            long first = number * HIGH, start = column * BLOCK;
            long rows = at_most(HIGH, s.outputs - first);
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
                    for (int y = 0; y < TAPS; y++)
                        store(gradient + ((first + i) * TAPS + y) * s.inputs + channel, w[y], s.inputs - channel);
                }
        }
}

/* Weights [C', 9, C] -> [9, C, padded C']. */
static void turn(Shape s, const float *weights, float *turned) {
#pragma omp for schedule(static) collapse(2)
    for (long tap = 0; tap < TAPS; tap++)
        for (long start = 0; start < s.inputs; start += LANES) {
            long count = at_most(LANES, s.inputs - start);
            for (long k = 0; k < s.padded_outputs; k++)
                for (long c = 0; c < count; c++)
                    turned[(tap * s.inputs + start + c) * s.padded_outputs + k] =
                        k < s.outputs ? weights[(k * TAPS + tap) * s.inputs + start + c] : 0;
        }
}

/* ---- What Python calls; `sizes` are N, H, W, C and C' ---- */

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

/* Numbers of scratch memory for a forward or a backward pass. */
long winograd_scratch(const long *sizes, int backward, int threads) {
    Shape s = shape_of(sizes);
    long inputs = PLACES * s.next_input, outputs = PLACES * s.next_output;
    return inputs + outputs + (backward ? 0 : TAPS * s.inputs * s.padded_outputs) + threads * block_size(s);
}

void winograd_forward(const long *sizes, int threads, const float *maps, const float *weights, float *result,
                      float *scratch) {
    Shape s = shape_of(sizes);
    float *inputs = scratch, *outputs = inputs + PLACES * s.next_input;
    float *turned = outputs + PLACES * s.next_output;
    float *blocks = turned + TAPS * s.inputs * s.padded_outputs;
#pragma omp parallel num_threads(threads)
    {
        turn(s, weights, turned);
        for_inputs(s, maps, inputs, input_to_places);
        products_with_weights(s.tiles, s.inputs, s.padded_inputs, s.padded_outputs, s.padded_outputs, inputs, turned,
                              s.inputs * s.padded_outputs, s.padded_outputs, outputs, blocks + THREAD * block_size(s));
        for_outputs(s, result, outputs, places_to_output);
    }
}

/* `of_maps` or `of_weights` may be NULL: not wanted. */
void winograd_backward(const long *sizes, int threads, const float *maps, const float *weights, const float *gradient,
                       float *of_maps, float *of_weights, float *scratch) {
    Shape s = shape_of(sizes);
    float *inputs = scratch, *outputs = inputs + PLACES * s.next_input;
    float *blocks = outputs + PLACES * s.next_output;
#pragma omp parallel num_threads(threads)
    {
        float *block = blocks + THREAD * block_size(s);
        for_outputs(s, gradient, outputs, output_to_places);
        if (of_weights) {
            for_inputs(s, maps, inputs, input_to_places);
            weight_gradient(s, outputs, inputs, of_weights, block);
        }
        if (of_maps) {
            products_with_weights(s.tiles, s.outputs, s.padded_outputs, s.inputs, s.padded_inputs, outputs, weights,
                                  s.inputs, TAPS * s.inputs, inputs, block);
            for_inputs(s, of_maps, inputs, places_to_input);
        }
    }
}
