/* Kernels for CPUs, compiled and called by native.py, which has the same structs:
 *
 * - decode: one decode step through all layers, for a few rows, with weights in F32, BF16, INT8 or INT4;
 * - multiply: one matmul, for the output layer and for prompts;
 * - attend_all: causal attention of a prompt, in bfloat16;
 * - dequantize: a quantized weight in full.
 *
 * With one row every weight is read once and used once, so memory bandwidth is the limit. Weights are therefore
 * converted to float32 in registers, one vector at a time, and no converted weight is written to memory.
 *
 * Everything is in one file, because kernels are inlined into their callers. One run of the compiler builds it.
 *
 * Contents, in this order (search for the titles):
 *
 *   Constants and vector types
 *   Structs shared with native.py
 *   Vectors: conversions, horizontal sums, load and store, exponential
 *   Matmul with F32 and BF16 weights
 *   Matmul with INT8 and INT4 weights
 *   Matmul with weights of any kind
 *   Decode step: norm, attention, feed-forward
 *   Attention of a prompt, in bfloat16
 *   Functions called from Python
 *
 * Names: m is the number of rows of x, W a weight [n, k], and `kind` a value of the enum below. A loop marked `omp for`
 * is divided among the threads of the parallel region from which its function is called. Functions marked INLINE take
 * arguments as `const int` if these must be constants after inlining, so that loops unroll and branches on `kind`
 * disappear. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Constants and vector types ---------------------------------------------------------------------- */

#define INLINE static inline __attribute__((always_inline))
#define GROUP 32            /* INT4: columns that share a scale and a zero */
#define KEY_BLOCK 256       /* keys that one thread processes at a time */
#define PREFETCH_BYTES 8192 /* how far ahead of the current address memory is prefetched */
#define QUERIES 64          /* queries times heads that one thread processes at a time */
#define X_ROWS 4            /* rows of x that are multiplied at a time by W_ROWS rows of an F32 or BF16 matrix */

/* LANES: 32-bit numbers in a vector register. ROWS: rows of x that are multiplied by a panel of a quantized matrix at a
 * time. W_ROWS: rows of an F32 or BF16 matrix that are multiplied by up to X_ROWS rows of x at a time. All sums of these
 * fit into the registers. KEEP: keeps an operand in its register; GCC 12 would otherwise load it again for each use. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#define ROWS 4
#define W_ROWS 4
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 2
#define W_ROWS 2
#define KEEP(v) __asm__ volatile("" : "+x"(v))
#else
#define LANES 4
#define ROWS 4
#define W_ROWS 2
#define KEEP(v)
#endif

/* Whether one instruction multiplies pairs of bfloat16 and adds. */
#if LANES == 16 && defined(__AVX512BF16__)
#define DOT_BF16 1
#else
#define DOT_BF16 0
#endif

/* The vectors hold LANES 32-bit numbers, LANES smaller ones (u16_lanes), or 2 * LANES smaller ones, two to a lane. */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16_lanes __attribute__((vector_size(2 * LANES)));
typedef uint16_t u16_pairs __attribute__((vector_size(4 * LANES)));
typedef int16_t s16_pairs __attribute__((vector_size(4 * LANES)));
typedef int8_t s8_pairs __attribute__((vector_size(2 * LANES)));

/* Structs shared with native.py ------------------------------------------------------------------- */

enum { F32, BF16, INT8, INT4 };

/* A weight [n, k]. F32 and BF16: row-major. INT8 and INT4: panels of LANES rows, one row to a lane; the last panel is
 * padded. An INT8 panel is [k / 2, LANES, 2] bytes. An INT4 panel is [k / 8, LANES] integers of 32 bits: the lower half
 * of each holds the columns 0 2 4 6, the upper half 1 3 5 7, low bits first.
 * scale: [n] for INT8. scale and zero: [n / LANES, k / 32, LANES] for INT4. Both are bfloat16.
 * An INT8 value is q * scale, an INT4 value (q - 8) * scale + zero. */
typedef struct {
    int64_t kind, n, k;
    const void *data;
    const uint16_t *scale, *zero;
} Matrix;

typedef struct {
    Matrix wqkv, wo, w13, w2;
    const void *attention_norm, *ffn_norm; /* of kind cache_kind */
    void *keys, *values; /* [rows, kv_heads, max_seq_len, head_dim] of kind cache_kind */
} Layer;

typedef struct {
    int64_t n_layers, dim, heads, kv_heads, head_dim, width, max_seq_len, cache_kind;
    float norm_eps;
    const Layer *layers;
    const void *norm; /* of kind cache_kind */
    const float *freqs_cis; /* cosine and sine: [max_seq_len, head_dim / 2, 2] */
    float *h, *qkv, *scores, *attended, *gate_up, *activations, *sums, *out; /* buffers for all rows */
    void *operands; /* a buffer, see matmul; NULL in float32 */
    int (*reduce)(void); /* sums `out` over the ranks, nonzero if that failed; NULL with one rank */
} Model;

/* Arguments of attend_all. q, out: [bsz, seqlen, heads, head_dim]. keys, values: as in Layer. starts [bsz]: the
 * positions of the first queries. slots [bsz]: the cache rows. All data is bfloat16. */
typedef struct {
    int64_t bsz, seqlen, heads, kv_heads, head_dim, max_seq_len;
    const uint16_t *q, *keys, *values;
    uint16_t *out;
    const int64_t *starts, *slots;
} AttentionArgs;

/* Vectors: conversions, horizontal sums, load and store, exponential ------------------------------ */

/* Uses intrinsics where GCC 12 would compile portable code to several instructions.
 * extend_u16: extends each number to 32 bits. extend_s8: extends each to 16 bits, two to a lane. reduce_add: the sum of
 * all lanes. reduce_add4: the sums of four vectors. */
#if LANES == 16
INLINE ints extend_u16(u16_lanes v) { return (ints)_mm512_cvtepu16_epi32((__m256i)v); }
INLINE ints extend_s8(s8_pairs v) { return (ints)_mm512_cvtepi8_epi16((__m256i)v); }
INLINE float reduce_add(floats v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE quad reduce_add4(floats a, floats b, floats c, floats d) {
    const __m512 v = (__m512)a, w = (__m512)b, x = (__m512)c, y = (__m512)d;
    const __m512 first = _mm512_unpacklo_ps(v, w) + _mm512_unpackhi_ps(v, w); /* a b a b, four times */
    const __m512 second = _mm512_unpacklo_ps(x, y) + _mm512_unpackhi_ps(x, y);
    const __m512 all = _mm512_shuffle_ps(first, second, 0x44) + _mm512_shuffle_ps(first, second, 0xee); /* a b c d */
    const __m256 half = _mm512_castps512_ps256(all) + _mm512_castps512_ps256(_mm512_shuffle_f32x4(all, all, 0x4e));
    return (quad)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#else
INLINE float reduce_add(floats v) {
    for (int n = LANES / 2; n; n /= 2)
        for (int j = 0; j < n; j++) v[j] += v[j + n];
    return v[0];
}
#endif
#if LANES == 8
INLINE ints extend_u16(u16_lanes v) { return (ints)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE ints extend_s8(s8_pairs v) { return (ints)_mm256_cvtepi8_epi16((__m128i)v); }
INLINE quad reduce_add4(floats a, floats b, floats c, floats d) {
    const __m256 first = _mm256_hadd_ps((__m256)a, (__m256)b), second = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 all = _mm256_hadd_ps(first, second); /* a b c d, twice */
    return (quad)(_mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
}
#elif LANES == 4
INLINE ints extend_u16(u16_lanes v) { return __builtin_convertvector(v, ints); }
INLINE ints extend_s8(s8_pairs v) { return (ints)__builtin_convertvector(v, s16_pairs); }
INLINE quad reduce_add4(floats a, floats b, floats c, floats d) {
    return (quad){reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
}
#endif

INLINE floats bf16_to_floats(u16_lanes h) { return (floats)(extend_u16(h) << 16); }

INLINE float bf16_to_float(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Copy `count` numbers. The usual count is a constant, and compiles to one instruction instead of a call. */
#define COPY(to, from, count, usual, size) \
    ((count) == (usual) ? memcpy(to, from, (usual) * (size)) : memcpy(to, from, (count) * (size)))

/* Elements [j, j + count) of F32 or BF16 data; lanes beyond count are zero. */
INLINE floats load(const int kind, const void *data, int64_t j, int64_t count) {
    if (kind == F32) {
        floats v = {0};
        COPY(&v, (const float *)data + j, count, LANES, 4);
        return v;
    }
    u16_lanes v = {0};
    COPY(&v, (const uint16_t *)data + j, count, LANES, 2);
    return bf16_to_floats(v);
}

/* Element j. */
INLINE float load1(const int kind, const void *data, int64_t j) {
    return kind == F32 ? ((const float *)data)[j] : bf16_to_float(((const uint16_t *)data)[j]);
}

INLINE void store(const int kind, void *data, int64_t j, float value) {
    if (kind == F32) {
        ((float *)data)[j] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    /* Round to nearest, ties to even; a NaN stays a NaN. */
    ((uint16_t *)data)[j] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE u16_lanes floats_to_bf16(floats v) { /* rounds as `store` does */
#if DOT_BF16
    return (u16_lanes)_mm512_cvtneps_pbh((__m512)v);
#else
    const ints bits = (ints)v;
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, u16_lanes);
#endif
}

INLINE void store_all(const int kind, void *data, int64_t j, floats v) {
    if (kind == F32) {
        memcpy((float *)data + j, &v, sizeof v);
        return;
    }
    const u16_lanes h = floats_to_bf16(v);
    memcpy((uint16_t *)data + j, &h, sizeof h);
}

/* Each lane of a and b holds two bfloat16: add both products to the lane of total. */
INLINE floats dot_bf16(floats total, ints a, ints b) {
#if DOT_BF16
    return (floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
    const int32_t high = 0xffff0000;
    return total + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & high) * (floats)(b & high);
#endif
}

/* 2 * LANES numbers of 16 bits, two to a lane; those beyond count are zero. */
INLINE ints load_pairs(const void *data, int64_t count) {
    ints v = {0};
    COPY(&v, data, count, 2 * LANES, 2);
    return v;
}

/* The number of lanes in use when `left` numbers are left. */
INLINE int64_t lane_count(int64_t left) { return left < LANES ? left : LANES; }

/* The larger of both, in each lane; b where either is NaN. */
INLINE floats max_lanes(floats a, floats b) {
    const ints above = a > b;
    return (floats)(((ints)a & above) | ((ints)b & ~above));
}

/* Limit the values to [low, high]; a NaN stays a NaN. */
INLINE floats clamp(floats v, float low, float high) {
    const ints below = v < low, above = v > high;
    const floats lows = low - (floats){0}, highs = high - (floats){0};
    return (floats)(((ints)v & ~below & ~above) | ((ints)lows & below) | ((ints)highs & above));
}

/* e^x within 2 units in the last place. x = n log 2 + r: a polynomial gives e^r (with the coefficients of Cephes'
 * expf), and n is added to the exponent bits. */
INLINE floats exponential(floats x) {
    const float round_bias = 12582912; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    x = clamp(x, -87, 88);
    const floats shifted = x * 1.44269504f + round_bias, n = shifted - round_bias;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return (floats)((ints)p + ((ints)shifted << 23));
}

/* Prefetch `count` bytes, PREFETCH_BYTES ahead of data. An address beyond the matrix does no harm. */
INLINE void prefetch(const void *data, int64_t count) {
    for (int64_t j = 0; j < count; j += 64) __builtin_prefetch((const char *)data + PREFETCH_BYTES + j, 0, 2);
}

/* Matmul with F32 and BF16 weights ---------------------------------------------------------------- */

/* y[r, i..i+rows) = W[i..i+rows, :] x[r, :] for r in 0..m, summed in registers.
 *
 * A single row of W is read as one stream, which the CPU prefetches, and summed in four independent chains. With
 * several rows of W and of x, each loaded vector is used for several products. */
INLINE void multiply_tile(const int kind, const int rows, const int m, const Matrix *w, int64_t i, const float *x,
                          int64_t x_stride, float *y, int64_t y_stride) {
    const int chains = rows < 4 && m < 4 ? 4 : 1;
    const int64_t k = w->k, parts = k / LANES;
    floats acc[4][4][4];
    float rest[4][4] = {{0}};
    for (int c = 0; c < chains; c++)
        for (int a = 0; a < rows; a++)
            for (int r = 0; r < m; r++) acc[c][a][r] = (floats){0};
    for (int64_t p = 0; p < parts; p += chains)
        for (int c = 0; c < chains; c++) {
            if (p + c >= parts) break;
            floats left[4];
#pragma GCC unroll 4
            for (int a = 0; a < rows; a++) {
                const int64_t j = (i + a) * k + (p + c) * LANES;
                if (rows == 1 && m == 1) prefetch((const char *)w->data + j * (kind == F32 ? 4 : 2), 1);
                floats v = load(kind, w->data, j, LANES);
                KEEP(v);
                left[a] = v;
            }
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) {
                floats right = load(F32, x, r * x_stride + (p + c) * LANES, LANES);
                KEEP(right);
#pragma GCC unroll 4
                for (int a = 0; a < rows; a++) acc[c][a][r] += left[a] * right;
            }
        }
    for (int64_t j = parts * LANES; j < k; j++)
        for (int a = 0; a < rows; a++)
            for (int r = 0; r < m; r++) rest[a][r] += load1(kind, w->data, (i + a) * k + j) * x[r * x_stride + j];
    for (int r = 0; r < m; r++) {
        if (rows == 4) { /* then chains is 1 */
            const quad totals = reduce_add4(acc[0][0][r], acc[0][1][r], acc[0][2][r], acc[0][3][r]);
            for (int a = 0; a < 4; a++) rest[a][r] += totals[a];
        } else {
            for (int a = 0; a < rows; a++)
                for (int c = 0; c < chains; c++) rest[a][r] += reduce_add(acc[c][a][r]);
        }
        for (int a = 0; a < rows; a++) y[r * y_stride + i + a] = rest[a][r];
    }
}

/* Rows [from, to) of an F32 or BF16 matrix, for each row of x alone. */
INLINE void multiply_rows(const int kind, const Matrix *w, int64_t from, int64_t to, const float *x, int64_t x_stride,
                          float *y, int64_t y_stride, int64_t m) {
    for (int64_t i = from; i < to; i++)
        for (int64_t r = 0; r < m; r++)
            multiply_tile(kind, 1, 1, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
}

/* Like multiply_rows, for the keys of a head: four keys at a time, for any number of queries (the rows of x). */
INLINE void multiply_keys(const int kind, const Matrix *w, int64_t from, int64_t to, const float *x, int64_t x_stride,
                          float *y, int64_t y_stride, int64_t m) {
    int64_t i = from;
    for (; i + 4 <= to; i += 4) {
        const int64_t item = kind == F32 ? 4 : 2;
        prefetch((const char *)w->data + i * w->k * item, 4 * w->k * item);
        for (int64_t r = 0; r < m; r += 4)
            switch (m - r) {
                case 1: multiply_tile(kind, 4, 1, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride); break;
                case 2: multiply_tile(kind, 4, 2, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride); break;
                case 3: multiply_tile(kind, 4, 3, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride); break;
                default: multiply_tile(kind, 4, 4, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
            }
    }
    multiply_rows(kind, w, i, to, x, x_stride, y, y_stride, m);
}

/* Several rows of x, for a BF16 matrix: bfloat16 if DOT_BF16. Otherwise float32, of every 2 * LANES columns first the
 * even and then the odd ones: a vector of the matrix is split in the same way, by one instruction for each half. Padded
 * with zeros to `padded` columns. */
#if DOT_BF16
typedef uint16_t operand;
#else
typedef float operand;
#endif

INLINE int64_t padded(int64_t k) { return (k + 2 * LANES - 1) / (2 * LANES) * 2 * LANES; }

static void to_operands(const float *x, int64_t k, operand *out) {
    int64_t j = 0;
    for (; DOT_BF16 && j < padded(k); j += LANES)
        store_all(BF16, out, j, load(F32, x, j, j < k ? lane_count(k - j) : 0));
    for (; j + 2 * LANES <= k; j += 2 * LANES)
        for (int l = 0; l < LANES; l++) {
            out[j + l] = x[j + 2 * l];
            out[j + LANES + l] = x[j + 2 * l + 1];
        }
    for (int l = 0; j < padded(k) && l < 2 * LANES; l++) out[j + l / 2 + l % 2 * LANES] = j + l < k ? x[j + l] : 0;
}

/* acc[a][r] += W[a, 0..count) x[r, 0..count), for one vector of each row of the matrix. */
INLINE void block_step(const int kind, const int rows, const int m, const void *w, int64_t w_stride, const void *x,
                       int64_t x_stride, int64_t count, floats acc[W_ROWS][X_ROWS]) {
    const int uses_pairs = kind == BF16 && DOT_BF16, parts = kind == BF16 && !DOT_BF16 ? 2 : 1;
    floats whole[W_ROWS];
#pragma GCC unroll 4
    for (int a = 0; a < rows; a++) {
        floats v = kind == F32 ? load(F32, w, a * w_stride, count)
                               : (floats)load_pairs((const uint16_t *)w + a * w_stride, count);
        KEEP(v);
        whole[a] = v;
    }
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++) {
        floats left[W_ROWS];
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) {
            const ints pairs = (ints)whole[a];
            floats v = parts == 1 ? whole[a] : (floats)(part ? pairs & (int32_t)0xffff0000 : pairs << 16);
            KEEP(v);
            left[a] = v;
        }
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
            floats right = uses_pairs ? (floats)load_pairs((const uint16_t *)x + r * x_stride, 2 * LANES)
                                      : load(F32, x, r * x_stride + part * LANES, kind == F32 ? count : LANES);
            KEEP(right);
#pragma GCC unroll 4
            for (int a = 0; a < rows; a++)
                acc[a][r] = uses_pairs ? dot_bf16(acc[a][r], (ints)left[a], (ints)right) : acc[a][r] + left[a] * right;
        }
    }
}

/* y[r, 0..rows) = W[0..rows, :] x[r, :] for r in 0..m, summed in registers.
 *
 * ahead: rows of the matrix that are needed later. In each step of the loop, `ahead_bytes` of them are prefetched. If
 * that were done at once, the CPU would wait for memory without computing. */
INLINE void block_tile(const int kind, const int rows, const int m, const void *w, const void *x, int64_t k, float *y,
                       int64_t y_stride, const char *ahead, int64_t ahead_bytes) {
    const int64_t each = kind == F32 ? LANES : 2 * LANES, full = k / each * each;
    const int64_t item = kind == F32 ? 4 : 2, x_item = kind == F32 ? 4 : sizeof(operand);
    const int64_t x_stride = kind == F32 ? k : padded(k);
    const char *left = w, *right = x;
    floats acc[W_ROWS][X_ROWS];
#pragma GCC unroll 4
    for (int a = 0; a < rows; a++)
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) acc[a][r] = (floats){0};
    for (int64_t j = 0; j < full; j += each) {
        __builtin_prefetch(ahead, 0, 2);
        for (int64_t line = 64; line < rows * each * item; line += 64)
            if (line < ahead_bytes) __builtin_prefetch(ahead + line, 0, 2);
        ahead += ahead_bytes;
        block_step(kind, rows, m, left + j * item, k, right + j * x_item, x_stride, each, acc);
    }
    if (full < k) block_step(kind, rows, m, left + full * item, k, right + full * x_item, x_stride, k - full, acc);
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
        const quad totals =
            reduce_add4(acc[0][r], acc[rows > 1][r], acc[rows > 2 ? 2 : 0][r], acc[rows > 3 ? 3 : 0][r]);
        memcpy(y + r * y_stride, &totals, rows * sizeof(float));
    }
}

/* Instances of block_tile. They are functions so that all registers are theirs: inlined into a larger function, GCC 12
 * keeps some of the sums in memory. */
typedef void Tile(const void *w, const void *x, int64_t k, float *y, int64_t y_stride, const char *ahead,
                  int64_t ahead_bytes);
#define TILE(name, kind, rows, m) \
    static __attribute__((noinline)) void name(const void *w, const void *x, int64_t k, float *y, int64_t y_stride, \
                                               const char *ahead, int64_t ahead_bytes) { \
        block_tile(kind, rows, m, w, x, k, y, y_stride, ahead, ahead_bytes); \
    }
TILE(tile_f32_1, F32, 1, 1)
TILE(tile_f32_2, F32, W_ROWS, 2)
TILE(tile_f32_3, F32, W_ROWS, 3)
TILE(tile_f32_4, F32, W_ROWS, 4)
TILE(tile_bf16_1, BF16, 1, 1)
TILE(tile_bf16_2, BF16, W_ROWS, 2)
TILE(tile_bf16_3, BF16, W_ROWS, 3)
TILE(tile_bf16_4, BF16, W_ROWS, 4)
/* For kinds F32 and BF16: one row of the matrix and one of x, then W_ROWS of the matrix and 2 to X_ROWS of x. */
static Tile *const TILES[2][X_ROWS] = {{tile_f32_1, tile_f32_2, tile_f32_3, tile_f32_4},
                                       {tile_bf16_1, tile_bf16_2, tile_bf16_3, tile_bf16_4}};

/* Rows [from, to) of an F32 or BF16 matrix, for m > 1 rows of x: `operand`s for BF16. 2 to X_ROWS rows of x at a time
 * stay in the CPU's smallest cache. The rows of the matrix come from memory the first time, and then from the CPU's
 * next larger cache. All the while, as many rows behind them are prefetched. */
static void multiply_block(const Matrix *w, int64_t from, int64_t to, const void *x, float *y, int64_t m) {
    const int64_t k = w->k, n = w->n, item = w->kind == F32 ? 4 : 2, groups = (m + X_ROWS - 1) / X_ROWS;
    const int64_t x_row = w->kind == F32 ? 4 * k : (int64_t)sizeof(operand) * padded(k);
    const char *data = w->data, *ahead = data + to * k * item;
    Tile *const *tiles = TILES[w->kind];
    for (int64_t g = 0; g < groups; g++) { /* groups of equal size, or nearly */
        const int64_t first = g * m / groups, rows = (g + 1) * m / groups - first;
        const char *right = (const char *)x + first * x_row;
        int64_t i = from;
        for (; i + W_ROWS <= to; i += W_ROWS, ahead += W_ROWS * k * item / groups)
            tiles[rows - 1](data + i * k * item, right, k, y + first * n + i, n, ahead, W_ROWS * LANES * 4 / groups);
        for (; i < to; i++)
            for (int64_t r = 0; r < rows; r++)
                tiles[0](data + i * k * item, right + r * x_row, k, y + (first + r) * n + i, n, ahead, 0);
    }
}

/* Matmul with INT8 and INT4 weights --------------------------------------------------------------- */

/* Each lane of a and b holds two integers of 16 bits: add both products to the lane of total. */
INLINE ints dot_s16(ints total, ints a, ints b) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif LANES == 8
    return total + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Columns 2 j and 2 j + 1 of a panel, two numbers to a lane: INT8 -127 to 127, INT4 0 to 15. */
INLINE ints load_columns(const int kind, const char *panel, int64_t j) {
    if (kind == INT8) {
        s8_pairs v;
        memcpy(&v, panel + j * sizeof v, sizeof v);
        return extend_s8(v);
    }
    u16_pairs v;
    memcpy(&v, panel + j / 4 * sizeof v, sizeof v);
    return (ints)(v >> (uint16_t)(j % 4 * 4) & 15);
}

INLINE floats low_halves(ints v) { return __builtin_convertvector(v << 16 >> 16, floats); }
INLINE floats high_halves(ints v) { return __builtin_convertvector(v >> 16, floats); }

/* The scales or zeros of a panel's rows, for INT4 those of column group g. */
INLINE floats load_scales(const int kind, const Matrix *w, const uint16_t *values, int64_t i, int64_t g) {
    return load(BF16, values, kind == INT8 ? i : i * (w->k / GROUP) + g * LANES, LANES);
}

/* y[r, i..i+LANES) = W[i..i+LANES, :] x[r, :] for r in 0..m, one row of the matrix to a lane.
 *
 * x: float32 if `exact`; otherwise integers of 16 bits, whose products are summed without rounding.
 * sums [m, k / 32 + 1]: the sum of x over each group of 32 columns, and last the scale of x (quantize_row). */
INLINE void multiply_panel(const int kind, const int m, const int exact, const Matrix *w, int64_t i, const void *x,
                           const float *sums, float *y) {
    const int unit = kind == INT8 ? 8 : GROUP / 2, chains = m < 4 ? 4 : 1;
    const int64_t k = w->k, groups = k / GROUP, units = k / 2 / unit, left = w->n - i;
    const char *data = (const char *)w->data + i * (kind == INT8 ? k : k / 2);
    floats total[2 * ROWS], sum_f32[4][2 * ROWS];
    ints sum_s32[4][2 * ROWS];
    for (int r = 0; r < m; r++) {
        total[r] = (floats){0};
        for (int c = 0; c < chains; c++) sum_f32[c][r] = (floats){0}, sum_s32[c][r] = (ints){0};
    }
    for (int64_t u = 0; u < units; u++, data += unit * (kind == INT8 ? 2 * LANES : LANES)) {
        for (int j = 0; j < unit; j++) {
            if (kind == INT4 && j % 4 == 0) prefetch(data + j * LANES, 1); /* INT8 is equally fast without it */
            ints v = load_columns(kind, data, j);
            KEEP(v);
            for (int r = 0; r < m; r++) {
                const int64_t at = r * k + 2 * (u * unit + j);
                if (exact) {
                    const float *two = (const float *)x + at;
                    sum_f32[j % chains][r] += low_halves(v) * two[0] + high_halves(v) * two[1];
                } else {
                    int32_t two;
                    memcpy(&two, (const int16_t *)x + at, sizeof two);
                    sum_s32[j % chains][r] = dot_s16(sum_s32[j % chains][r], v, two - (ints){0});
                }
            }
        }
        if (kind == INT8 && u % 32 < 31 && u + 1 < units) continue; /* the sum of 32 units fits into 32 bits */
        const floats scale = load_scales(kind, w, w->scale, i, u);
        for (int r = 0; r < m; r++) {
            floats sum = {0};
            for (int c = 0; c < chains; c++) {
                sum += exact ? sum_f32[c][r] : __builtin_convertvector(sum_s32[c][r], floats);
                sum_f32[c][r] = (floats){0}, sum_s32[c][r] = (ints){0};
            }
            total[r] += sum * scale;
            /* (q - 8) * scale + zero: the terms without q are multiplied by the sum of x over the group. */
            if (kind == INT4)
                total[r] += (load_scales(kind, w, w->zero, i, u) - 8 * scale) * sums[r * (groups + 1) + u];
        }
    }
    for (int r = 0; r < m; r++) {
        total[r] *= sums[r * (groups + 1) + groups];
        COPY(y + r * w->n + i, &total[r], lane_count(left), LANES, 4);
    }
}

/* multiply_panel for the panel of row i and any number m of rows of x. */
INLINE void multiply_panel_rows(const int kind, const int exact, const Matrix *w, int64_t i, const void *x,
                                const float *sums, float *y, int64_t m) {
    const int64_t k = w->k, each = k / GROUP + 1, size = exact ? 4 : 2;
    int64_t r = 0;
    const char *row = x;
    for (; r + 2 * ROWS <= m; r += 2 * ROWS)
        multiply_panel(kind, 2 * ROWS, exact, w, i, row + r * k * size, sums + r * each, y + r * w->n);
    for (; r + ROWS <= m; r += ROWS)
        multiply_panel(kind, ROWS, exact, w, i, row + r * k * size, sums + r * each, y + r * w->n);
    for (; r < m; r++) multiply_panel(kind, 1, exact, w, i, row + r * k * size, sums + r * each, y + r * w->n);
}

/* Round a row x [k] to integers of 16 bits, unless out is NULL, and fill `sums` as multiply_panel expects.
 *
 * The rounding error of a number is at most 2^-16 of the row's largest magnitude. That magnitude is at most sqrt(k)
 * times the row's root mean square. So up to k = 2^14 the error is at most 2^-9 of that mean, as when rounding to
 * bfloat16; above, that needs a row in which one number does not stand for nearly all of the sum of squares. */
static void quantize_row(const float *x, int64_t k, int16_t *out, float *sums) {
    const float round_bias = 12582912; /* as in exponential */
    floats max = {0}, taint = {0};
    for (int64_t j = 0; out && j < k; j += LANES) {
        const floats v = load(F32, x, j, LANES), size = (floats)((ints)v & 0x7fffffff);
        max = max_lanes(size, max);
        taint += v - v; /* NaN where x is not finite */
    }
    float largest = reduce_add(taint);
    for (int j = 0; j < LANES; j++) largest = max[j] > largest ? max[j] : largest;
    const float scale = out ? largest / 32767 + reduce_add(taint) : 1;
    const float inverse = scale > 1.2e-38f ? 1 / scale : 0; /* below this 1 / scale is infinite; x counts as 0 */
    for (int64_t j = 0; j < k; j += GROUP) {
        floats total = {0};
        for (int64_t l = j; l < j + GROUP && l < k; l += LANES) {
            floats v = load(F32, x, l, LANES);
            if (out) {
                v = v * inverse + round_bias;
                const u16_lanes rounded = __builtin_convertvector((ints)v, u16_lanes);
                memcpy(out + l, &rounded, sizeof rounded);
                v -= round_bias;
            }
            total += v;
        }
        sums[j / GROUP] = reduce_add(total);
    }
    sums[k / GROUP] = scale;
}

/* Dequantize the panel of row i: k numbers of kind `to` (F32 or BF16) for each of its rows. */
INLINE void dequantize_panel(const int from, const int to, const Matrix *w, int64_t i, void *out) {
    const int64_t k = w->k, rows = lane_count(w->n - i);
    const char *data = (const char *)w->data + i * (from == INT8 ? k : k / 2);
    for (int64_t j = 0; j < k / 2; j++) {
        const ints v = load_columns(from, data + j / 16 * LANES * (from == INT8 ? 32 : 16), j % 16);
        const floats scale = load_scales(from, w, w->scale, i, j / 16);
        floats low = low_halves(v), high = high_halves(v);
        if (from == INT4) {
            const floats zero = load_scales(from, w, w->zero, i, j / 16);
            low = (low - 8) * scale + zero;
            high = (high - 8) * scale + zero;
        } else {
            low *= scale;
            high *= scale;
        }
        if (to == F32) {
            for (int64_t l = 0; l < rows; l++) {
                ((float *)out)[l * k + 2 * j] = low[l];
                ((float *)out)[l * k + 2 * j + 1] = high[l];
            }
        } else {
            const ints both = extend_u16(floats_to_bf16(low)) | extend_u16(floats_to_bf16(high)) << 16;
            for (int64_t l = 0; l < rows; l++) memcpy((uint16_t *)out + l * k + 2 * j, (int32_t *)&both + l, 4);
        }
    }
}

/* Matmul with weights of any kind ----------------------------------------------------------------- */

/* y [m, n] = x [m, k] W^T. sums: a buffer of m * (k / 32 + 1) floats.
 *
 * operands: NULL in float32 models. In bfloat16 models a buffer of m * padded(k) floats: x is written there as integers
 * of 16 bits for INT8 and INT4 weights, and by to_operands for BF16 weights if m > 1. */
static void matmul(const Matrix *w, const float *x, float *sums, void *operands, float *y, int64_t m) {
    const int64_t k = w->k;
    const int is_quantized = w->kind == INT8 || w->kind == INT4, is_bf16 = m > 1 && w->kind == BF16;
    if (is_quantized || is_bf16) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < m; r++) {
            if (is_quantized)
                quantize_row(x + r * k, k, operands ? (int16_t *)operands + r * k : 0, sums + r * (k / GROUP + 1));
            if (is_bf16) to_operands(x + r * k, k, (operand *)operands + r * padded(k));
        }
    }
    const int64_t step = is_quantized ? LANES : 16;
#pragma omp for schedule(guided)
    for (int64_t i = 0; i < w->n; i += step) {
        const int64_t to = i + step < w->n ? i + step : w->n;
        if (w->kind == INT8 && operands)
            multiply_panel_rows(INT8, 0, w, i, operands, sums, y, m);
        else if (w->kind == INT8)
            multiply_panel_rows(INT8, 1, w, i, x, sums, y, m);
        else if (w->kind == INT4 && operands)
            multiply_panel_rows(INT4, 0, w, i, operands, sums, y, m);
        else if (w->kind == INT4)
            multiply_panel_rows(INT4, 1, w, i, x, sums, y, m);
        else if (m > 1)
            multiply_block(w, i, to, is_bf16 ? operands : (const void *)x, y, m);
        else if (w->kind == BF16)
            multiply_rows(BF16, w, i, to, x, k, y, w->n, m);
        else
            multiply_rows(F32, w, i, to, x, k, y, w->n, m);
    }
}

/* Decode step: norm, attention, feed-forward ------------------------------------------------------ */

static void rms_norm(const Model *model, const void *weight, const float *x, float *out, int64_t m) {
    const int64_t dim = model->dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) {
        floats squares = {0};
        for (int64_t j = 0; j < dim; j += LANES) {
            const floats v = load(F32, x, r * dim + j, lane_count(dim - j));
            squares += v * v;
        }
        const float scale = 1 / sqrtf(reduce_add(squares) / dim + model->norm_eps);
        for (int64_t j = 0; j < dim; j += LANES) {
            const int64_t count = lane_count(dim - j);
            const floats w = model->cache_kind == F32 ? load(F32, weight, j, count) : load(BF16, weight, j, count);
            const floats v = load(F32, x, r * dim + j, count) * scale * w;
            COPY(out + r * dim + j, &v, count, LANES, 4);
        }
    }
}

/* Softmax in place. The maximum is subtracted first, so that the exponentials do not overflow. */
static void softmax(float *p, int64_t n) {
    const int64_t full = n / LANES * LANES;
    floats max = p[0] - (floats){0}, total = {0};
    for (int64_t t = 0; t < full; t += LANES) max = max_lanes(load(F32, p, t, LANES), max);
    float highest = p[0];
    for (int j = 0; j < LANES; j++) highest = max[j] > highest ? max[j] : highest;
    for (int64_t t = full; t < n; t++) highest = p[t] > highest ? p[t] : highest;
    for (int64_t t = 0; t < n; t += LANES) {
        const int64_t count = lane_count(n - t);
        const floats power = exponential(load(F32, p, t, count) - highest);
        COPY(p + t, &power, count, LANES, 4);
        total += load(F32, p, t, count);
    }
    const float inverse_sum = 1 / reduce_add(total);
    for (int64_t t = 0; t < n; t++) p[t] *= inverse_sum;
}

/* out[d..d+first+second) = sum over t of p[t] * values[t, d..d+first+second), for m heads that share the values.
 * first, second: LANES or fewer each. */
INLINE void weighted_part(const int kind, const int m, const void *values, int64_t head_dim, int64_t d, int64_t first,
                          int64_t second, const float *p, int64_t p_stride, int64_t ctx_len, float *out) {
    floats acc[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) acc[r][0] = acc[r][1] = (floats){0};
    for (int64_t t = 0; t < ctx_len; t++) {
        prefetch((const char *)values + (t * head_dim + d) * (kind == F32 ? 4 : 2), 1);
        const floats a = load(kind, values, t * head_dim + d, first);
        const floats b = load(kind, values, t * head_dim + d + first, second);
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
            acc[r][0] += a * p[r * p_stride + t];
            acc[r][1] += b * p[r * p_stride + t];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
        COPY(out + r * head_dim + d, &acc[r][0], first, LANES, 4);
        COPY(out + r * head_dim + d + first, &acc[r][1], second, LANES, 4);
    }
}

/* weighted_part for 2 * LANES columns, or as many as there are. Functions for the reason given at TILE. */
typedef void Weighted(const void *values, int64_t head_dim, int64_t d, const float *p, int64_t p_stride,
                      int64_t ctx_len, float *out);
#define WEIGHTED(name, kind, m) \
    static __attribute__((noinline)) void name(const void *values, int64_t head_dim, int64_t d, const float *p, \
                                               int64_t p_stride, int64_t ctx_len, float *out) { \
        const int64_t left = head_dim - d, first = lane_count(left), second = lane_count(left - first); \
        if (second == LANES) \
            weighted_part(kind, m, values, head_dim, d, LANES, LANES, p, p_stride, ctx_len, out); \
        else \
            weighted_part(kind, m, values, head_dim, d, first, second, p, p_stride, ctx_len, out); \
    }
WEIGHTED(weighted_f32_1, F32, 1)
WEIGHTED(weighted_f32_2, F32, 2)
WEIGHTED(weighted_f32_3, F32, 3)
WEIGHTED(weighted_f32_4, F32, 4)
WEIGHTED(weighted_bf16_1, BF16, 1)
WEIGHTED(weighted_bf16_2, BF16, 2)
WEIGHTED(weighted_bf16_3, BF16, 3)
WEIGHTED(weighted_bf16_4, BF16, 4)
/* For kinds F32 and BF16, and 1 to 4 heads. */
static Weighted *const weighted_values[2][4] = {{weighted_f32_1, weighted_f32_2, weighted_f32_3, weighted_f32_4},
                                                {weighted_bf16_1, weighted_bf16_2, weighted_bf16_3, weighted_bf16_4}};

/* qkv -> attended [m, heads, head_dim]: apply RoPE to the new position of each row, store its key and value, attend. */
INLINE void attend_step(const int kind, const Model *model, const Layer *layer, const int64_t *positions,
                        const int64_t *slots, int64_t m) {
    const int64_t heads = model->heads, kv_heads = model->kv_heads, head_dim = model->head_dim;
    const int64_t group = heads / kv_heads, stride = (heads + 2 * kv_heads) * head_dim, max_len = model->max_seq_len;
    const float scale = 1 / sqrtf(head_dim);
    int64_t longest = 0;
    for (int64_t r = 0; r < m; r++) longest = positions[r] + 1 > longest ? positions[r] + 1 : longest;
    const int64_t blocks = (longest + KEY_BLOCK - 1) / KEY_BLOCK, item = kind == F32 ? 4 : 2;

#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * (heads + 2 * kv_heads); i++) {
        const int64_t r = i / (heads + 2 * kv_heads), head = i % (heads + 2 * kv_heads), at = positions[r];
        float *x = model->qkv + r * stride + head * head_dim;
        const int64_t kv_head = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
        const int64_t place = ((slots[r] * kv_heads + kv_head) * max_len + at) * head_dim;
        for (int64_t j = 0; j < head_dim; j += 2) {
            const float even = x[j], odd = x[j + 1];
            if (head < heads + kv_heads) {
                const float c = model->freqs_cis[at * head_dim + j], s = model->freqs_cis[at * head_dim + j + 1];
                x[j] = even * c - odd * s;
                x[j + 1] = even * s + odd * c;
            }
            if (head < heads) {
                x[j] *= scale;
                x[j + 1] *= scale;
            }
        }
        void *to = head < heads + kv_heads ? layer->keys : layer->values;
        int64_t j = 0;
        for (; head >= heads && j + LANES <= head_dim; j += LANES)
            store_all(kind, to, place + j, load(F32, x, j, LANES));
        for (; head >= heads && j < head_dim; j++) store(kind, to, place + j, x[j]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * kv_heads * blocks; i++) {
        const int64_t r = i / (kv_heads * blocks), kv_head = i / blocks % kv_heads, from = i % blocks * KEY_BLOCK;
        const int64_t ctx_len = positions[r] + 1, to = from + KEY_BLOCK < ctx_len ? from + KEY_BLOCK : ctx_len;
        const char *keys = (const char *)layer->keys + (slots[r] * kv_heads + kv_head) * max_len * head_dim * item;
        const Matrix w = {kind, ctx_len, head_dim, keys, 0, 0};
        multiply_keys(kind, &w, from, to, model->qkv + r * stride + kv_head * group * head_dim, head_dim,
                      model->scores + (r * heads + kv_head * group) * max_len, max_len, group);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * heads; i++) softmax(model->scores + i * max_len, positions[i / heads] + 1);
    const int64_t parts = (head_dim + 2 * LANES - 1) / (2 * LANES);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * kv_heads * parts; i++) {
        const int64_t r = i / (kv_heads * parts), kv_head = i / parts % kv_heads, d = i % parts * 2 * LANES;
        const char *values = (const char *)layer->values + (slots[r] * kv_heads + kv_head) * max_len * head_dim * item;
        const int64_t first = r * heads + kv_head * group, ctx_len = positions[r] + 1;
        for (int64_t g = 0; g < group; g += 4) {
            const float *p = model->scores + (first + g) * max_len;
            float *out = model->attended + (first + g) * head_dim;
            const int64_t count = group - g < 4 ? group - g : 4;
            weighted_values[kind][count - 1](values, head_dim, d, p, max_len, ctx_len, out);
        }
    }
}

/* x [m, dim] -> out, before the residual is added. */
static void attention(const Model *model, const Layer *layer, const float *x, const int64_t *positions,
                      const int64_t *slots, int64_t m) {
    rms_norm(model, layer->attention_norm, x, model->h, m);
    matmul(&layer->wqkv, model->h, model->sums, model->operands, model->qkv, m);
    if (model->cache_kind == F32)
        attend_step(F32, model, layer, positions, slots, m);
    else
        attend_step(BF16, model, layer, positions, slots, m);
    matmul(&layer->wo, model->attended, model->sums, model->operands, model->out, m);
}

/* x [m, dim] -> out, before the residual is added. */
static void feed_forward(const Model *model, const Layer *layer, const float *x, int64_t m) {
    const int64_t width = model->width;
    rms_norm(model, layer->ffn_norm, x, model->h, m);
    matmul(&layer->w13, model->h, model->sums, model->operands, model->gate_up, m);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * width; i += LANES) {
        /* A vector may start in one row and end in the next. */
        floats gate = {0}, up = {0};
        const int64_t count = lane_count(m * width - i), left = width - i % width;
        const float *row = model->gate_up + i / width * 2 * width + i % width;
        COPY(&gate, row, count < left ? count : left, LANES, 4);
        COPY(&up, row + width, count < left ? count : left, LANES, 4);
        for (int64_t j = left; j < count; j++) {
            gate[j] = row[width + j];
            up[j] = row[2 * width + j];
        }
        const floats product = gate / (1 + exponential(-gate)) * up;
        COPY(model->activations + i, &product, count, LANES, 4);
    }
    matmul(&layer->w2, model->activations, model->sums, model->operands, model->out, m);
}

/* Sum `out` over the ranks and add it to x. Returns nonzero if the reduction failed. */
static int reduce_and_add(const Model *model, float *x, int64_t m) {
    if (model->reduce && model->reduce()) return 1;
    for (int64_t j = 0; j < m * model->dim; j++) x[j] += model->out[j];
    return 0;
}

/* Attention of a prompt, in bfloat16 -------------------------------------------------------------- */

/* c [4, ..] += a [4, k] b [k, ..] in columns [from, from + vectors * LANES). Elements of a and b are pairs of bfloat16:
 * neighbours in a row of a, neighbours in a column of b. */
INLINE void accumulate_tile(const int vectors, const int32_t *a, int64_t a_stride, const int32_t *b, float *c,
                            int64_t stride, int64_t k, int64_t from) {
    floats acc[4][4];
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < vectors; v++) acc[r][v] = load(F32, c, r * stride + from + v * LANES, LANES);
    for (int64_t j = 0; j < k; j++)
        for (int v = 0; v < vectors; v++) {
            const ints pairs = load_pairs(b + j * stride + from + v * LANES, 2 * LANES);
            for (int r = 0; r < 4; r++) acc[r][v] = dot_bf16(acc[r][v], a[r * a_stride + j] - (ints){0}, pairs);
        }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < vectors; v++) store_all(F32, c, r * stride + from + v * LANES, acc[r][v]);
}

/* c [rows, columns] += a [rows, k] b [k, columns], four rows and LANES columns at a time. stride: of b and c. */
static void accumulate(const int32_t *a, int64_t a_stride, const int32_t *b, float *c, int64_t stride, int64_t rows,
                       int64_t k, int64_t columns) {
    for (int64_t r = 0; r < rows; r += 4) {
        int64_t j = 0;
        for (; j + 4 * LANES <= columns; j += 4 * LANES)
            accumulate_tile(4, a + r * a_stride, a_stride, b, c + r * stride, stride, k, j);
        for (; j < columns; j += LANES) accumulate_tile(1, a + r * a_stride, a_stride, b, c + r * stride, stride, k, j);
    }
}

/* Attention of the queries [first, first + count) of the heads that share a KV head, over KEY_BLOCK keys at a time,
 * with online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135): exponentials
 * are relative to the highest score so far, and the sums so far are scaled down when a higher score is found. */
static void attend_block(const AttentionArgs *args, int64_t row, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t head_dim = args->head_dim, group = args->heads / args->kv_heads, start = args->starts[row];
    const int64_t half = head_dim / 2, width = (head_dim + LANES - 1) / LANES * LANES;
    const int64_t used = group * count, rows = (used + 3) / 4 * 4;
    const int64_t offset = (args->slots[row] * args->kv_heads + kv_head) * args->max_seq_len * head_dim;
    const float scale = 1 / sqrtf(head_dim);
    int32_t q[rows * half], keys[half * KEY_BLOCK], values[KEY_BLOCK / 2 * width], probs[rows * KEY_BLOCK / 2];
    float scores[rows * KEY_BLOCK], out[rows * width], highest[rows], total[rows];
    memset(q, 0, sizeof q);
    memset(keys, 0, sizeof keys);
    memset(values, 0, sizeof values);
    memset(probs, 0, sizeof probs);
    memset(out, 0, sizeof out);
    for (int64_t r = 0; r < used; r++) {
        const int64_t place = (row * args->seqlen + first + r / group) * args->heads + kv_head * group + r % group;
        memcpy(q + r * half, args->q + place * head_dim, head_dim * 2);
        highest[r] = -INFINITY;
        total[r] = 0;
    }
    const int64_t end = start + first + count; /* the last query attends to all positions before this one */
    for (int64_t from = 0; from < end; from += KEY_BLOCK) {
        const int64_t length = end - from < KEY_BLOCK ? end - from : KEY_BLOCK;
        const int64_t columns = (length + 4 * LANES - 1) / (4 * LANES) * 4 * LANES;
        const uint16_t *key = args->keys + offset + from * head_dim;
        for (int64_t j = 0; j < half; j++)
            for (int64_t t = 0; t < length; t++) memcpy(keys + j * KEY_BLOCK + t, key + t * head_dim + 2 * j, 4);
        for (int64_t t = 0; t < length; t += 2) {
            const uint16_t *even = args->values + offset + (from + t) * head_dim, *odd = even + head_dim;
            if (t + 1 == length) odd = even; /* pads the pair; its probability is zero */
            for (int64_t j = 0; j < head_dim; j++) values[t / 2 * width + j] = even[j] | (uint32_t)odd[j] << 16;
        }
        memset(scores, 0, sizeof scores);
        accumulate(q, half, keys, scores, KEY_BLOCK, rows, half, columns);
        for (int64_t r = 0; r < used; r++) {
            const int64_t own = start + first + r / group + 1 - from, seen = own < length ? own : length;
            float *score = scores + r * KEY_BLOCK;
            floats max = {0}, sums = {0};
            max -= INFINITY;
            for (int64_t t = 0; t < seen; t += LANES)
                for (int j = 0; t + LANES > seen && j < LANES; j++)
                    if (t + j >= seen) score[t + j] = -INFINITY;
            for (int64_t t = 0; t < seen; t += LANES) max = max_lanes(load(F32, score, t, LANES) * scale, max);
            const float before = highest[r];
            for (int j = 0; j < LANES; j++) highest[r] = max[j] > highest[r] ? max[j] : highest[r];
            for (int64_t t = 0; t < columns; t += LANES) {
                floats prob = {0};
                if (t < seen) prob = exponential(load(F32, score, t, LANES) * scale - highest[r]);
                store_all(BF16, probs + r * KEY_BLOCK / 2, t, prob);
                sums += prob;
            }
            const float shrink = before == highest[r] ? 1 : expf(before - highest[r]);
            total[r] = total[r] * shrink + reduce_add(sums);
            for (int64_t j = 0; j < width; j++) out[r * width + j] *= shrink;
        }
        accumulate(probs, KEY_BLOCK / 2, values, out, width, rows, (length + 1) / 2, width);
    }
    for (int64_t r = 0; r < used; r++) {
        const int64_t place = (row * args->seqlen + first + r / group) * args->heads + kv_head * group + r % group;
        for (int64_t j = 0; j < head_dim; j++)
            store(BF16, args->out, place * head_dim + j, out[r * width + j] / total[r]);
    }
}

/* Functions called from Python -------------------------------------------------------------------- */

/* One decode step. x [m, dim]: the embeddings of the new ids, replaced by the normed hidden states. positions, slots
 * [m]: the position of each new id, and the cache row. Returns nonzero if a reduction over the ranks failed. */
int decode(const Model *model, float *x, const int64_t *positions, const int64_t *slots, int64_t m, int threads) {
    for (int64_t i = 0; i < model->n_layers; i++) {
        const Layer *layer = model->layers + i;
#pragma omp parallel num_threads(threads)
        attention(model, layer, x, positions, slots, m);
        if (reduce_and_add(model, x, m)) return 1;
#pragma omp parallel num_threads(threads)
        feed_forward(model, layer, x, m);
        if (reduce_and_add(model, x, m)) return 1;
    }
#pragma omp parallel num_threads(threads)
    rms_norm(model, model->norm, x, model->h, m);
    memcpy(x, model->h, m * model->dim * sizeof(float));
    return 0;
}

/* y [m, n] = x [m, k] W^T; arguments as in matmul. */
void multiply(const Matrix *w, const float *x, float *sums, void *operands, float *y, int64_t m, int threads) {
#pragma omp parallel num_threads(threads)
    matmul(w, x, sums, operands, y, m);
}

/* Causal attention of all queries. */
void attend_all(const AttentionArgs *args, int threads) {
    const int64_t group = args->heads / args->kv_heads, size = group < QUERIES ? QUERIES / group : 1;
    const int64_t blocks = (args->seqlen + size - 1) / size;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < args->bsz * args->kv_heads * blocks; i++) {
        /* Blocks with the most keys come first, so that no thread waits long at the end. */
        const int64_t first = (blocks - 1 - i / (args->bsz * args->kv_heads)) * size;
        const int64_t count = args->seqlen - first < size ? args->seqlen - first : size;
        attend_block(args, i / args->kv_heads % args->bsz, i % args->kv_heads, first, count);
    }
}

/* The number of rows in a panel of an INT8 or INT4 matrix. */
int panel_rows(void) { return LANES; }

/* Dequantize an INT8 or INT4 matrix to [n, k] of kind F32 or BF16, for matmuls with many rows. */
void dequantize(const Matrix *w, void *out, int to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < w->n; i += LANES) {
        char *rows = (char *)out + i * w->k * (to == F32 ? 4 : 2);
        if (w->kind == INT8 && to == F32) dequantize_panel(INT8, F32, w, i, rows);
        if (w->kind == INT8 && to == BF16) dequantize_panel(INT8, BF16, w, i, rows);
        if (w->kind == INT4 && to == F32) dequantize_panel(INT4, F32, w, i, rows);
        if (w->kind == INT4 && to == BF16) dequantize_panel(INT4, BF16, w, i, rows);
    }
}
