/* What a session of ONNX Runtime asks CUDA for while it is made, answered without a GPU.

   The device is a pretended one of compute capability 9.0 with 8 GiB; its memory is the host's. Every other function
   that the providers name is made by build.py and returns 0, which means success; so does launching a kernel. Nothing is
   computed. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define MAJOR 9
#define MINOR 0
#define PROCESSORS 132
#define GIB ((size_t)1 << 30)

/* The beginning of cudaDeviceProp in CUDA 13, up to the last field that is given; 1008 bytes altogether. */
struct properties {
    char name[256], ids[28];
    size_t memory, shared_memory;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constants;
    int major, minor;
    size_t alignments[2];
    int processors;
    char rest[1008 - 388];
};
_Static_assert(offsetof(struct properties, memory) == 288 && offsetof(struct properties, major) == 360 &&
               offsetof(struct properties, processors) == 384 && sizeof(struct properties) == 1008, "layout of CUDA 13");

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorName(int error) { return "stub"; }
const char *cudaGetErrorString(int error) { return "stand-in for CUDA"; }

int cudaGetDeviceProperties(struct properties *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "none (stand-in)");
    found->memory = 8 * GIB;
    found->shared_memory = 48 << 10;
    found->registers = 65536;
    found->warp = 32;
    found->threads = found->block[0] = found->block[1] = 1024;
    found->block[2] = 64;
    found->grid[0] = 2147483647;
    found->grid[1] = found->grid[2] = 65535;
    found->major = MAJOR;
    found->minor = MINOR;
    found->processors = PROCESSORS;
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = 1024; break;        /* threads of a block */
        case 8: *value = 48 << 10; break;    /* shared memory of a block */
        case 10: *value = 32; break;         /* threads of a warp */
        case 16: *value = PROCESSORS; break;
        case 75: *value = MAJOR; break;
        case 76: *value = MINOR; break;
        case 81: *value = 228 << 10; break;  /* shared memory of a processor */
        case 97: *value = 227 << 10; break;  /* shared memory that a block may ask for */
        default: *value = 1;
    }
    return 0;
}

int cudaFuncGetAttributes(void *found, const void *function) { memset(found, 0, 72); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int threads, size_t shared,
                                                           unsigned flags) { *count = 1; return 0; }

int cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = 7 * GIB; *total = 8 * GIB; return 0; }
int cudaMalloc(void **place, size_t bytes) { return posix_memalign(place, 256, bytes ? bytes : 1) ? 2 : 0; }
int cudaMallocHost(void **place, size_t bytes) { return cudaMalloc(place, bytes); }
int cudaHostAlloc(void **place, size_t bytes, unsigned flags) { return cudaMalloc(place, bytes); }
int cudaMallocFromPoolAsync(void **place, size_t bytes, void *pool, void *stream) { return cudaMalloc(place, bytes); }
int cudaFree(void *place) { free(place); return 0; }
int cudaFreeHost(void *place) { free(place); return 0; }
int cudaFreeAsync(void *place, void *stream) { free(place); return 0; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { memcpy(to, from, bytes); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { return cudaMemcpy(to, from, bytes, kind); }
int cudaMemset(void *place, int value, size_t bytes) { memset(place, value, bytes); return 0; }
int cudaMemsetAsync(void *place, int value, size_t bytes, void *stream) { return cudaMemset(place, value, bytes); }

/* Handles: nothing looks into them, but they must not be null. */
static char thing;
#define HANDLE(name) int name(void **made) { *made = &thing; return 0; }
HANDLE(cudaStreamCreate)
HANDLE(cudaStreamCreateWithFlags)
HANDLE(cudaEventCreate)
HANDLE(cudaEventCreateWithFlags)
HANDLE(cudaMemPoolCreate)
HANDLE(cublasCreate_v2)
HANDLE(cublasLtCreate)
HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cublasLtMatrixTransformDescCreate)
int __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

/* The last <<<grid, block>>> is kept for the launch that follows it. */
static struct { unsigned size[6]; size_t shared; void *stream; } launch;
typedef struct { unsigned x, y, z; } dim3;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    memcpy(launch.size, &grid, sizeof grid);
    memcpy(launch.size + 3, &block, sizeof block);
    launch.shared = shared;
    launch.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    memcpy(grid, launch.size, sizeof *grid);
    memcpy(block, launch.size + 3, sizeof *block);
    *shared = launch.shared;
    *stream = launch.stream;
    return 0;
}
