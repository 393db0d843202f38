/* A stand-in for NVIDIA's libnvidia-ml.so.1: real pynvml calls it, and hears what a text file says.

   The file is named by the environment variable NVML_STUB_STATE and read again at every call; one fact a line:

     gpu TOTAL_MIB USED_MIB POWER_MW UTILIZATION TEMPERATURE NAME     the first line is GPU 0, and so on
     process GPU compute|graphics PID USED_MIB                        USED_MIB -1: the driver does not say
     fail FUNCTION GPU CODE                                           GPU -1: on every one
     hang FUNCTION                                                    until the file no longer says so

   Without the file there is no driver. tests/gpu_admin/nvml.py writes it. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_GPUS 16
#define MAX_PROCESSES 512
#define EVERY_GPU -1
#define NOT_AVAILABLE (~0ULL)

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
};

/* The shapes that NVML's header gives them. */
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } ProcessInfo;

typedef struct {
    unsigned long long total_mib, used_mib;
    unsigned power_mw, utilization, temperature;
    char name[96];
} Gpu;

typedef struct {
    int gpu;
    char kind[16];
    unsigned pid;
    long long used_mib;
} Process;

/* Read into the caller's stack, so that threads do not see each other's. */
typedef struct {
    Gpu gpus[MAX_GPUS];
    Process processes[MAX_PROCESSES];
    int gpu_count, process_count;
} State;

static int initialized;

/* The state now; the code that `function` is to fail with on that GPU, or SUCCESS. */
static int read_state(State *state, const char *function, int gpu) {
    const char *path = getenv("NVML_STUB_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256];
    int result = SUCCESS, hangs = 0;

    memset(state, 0, sizeof *state);
    if (!file)
        return DRIVER_NOT_LOADED;
    while (fgets(line, sizeof line, file)) {
        Gpu *card = &state->gpus[state->gpu_count];
        Process *process = &state->processes[state->process_count];
        char failing[64];
        int failing_gpu, code;
        if (state->gpu_count < MAX_GPUS &&
            sscanf(line, "gpu %llu %llu %u %u %u %95[^\n]", &card->total_mib, &card->used_mib, &card->power_mw,
                   &card->utilization, &card->temperature, card->name) == 6)
            state->gpu_count++;
        else if (state->process_count < MAX_PROCESSES &&
                 sscanf(line, "process %d %15s %u %lld", &process->gpu, process->kind, &process->pid,
                        &process->used_mib) == 4)
            state->process_count++;
        else if (sscanf(line, "fail %63s %d %d", failing, &failing_gpu, &code) == 3 && !strcmp(failing, function) &&
                 (failing_gpu == EVERY_GPU || failing_gpu == gpu))
            result = code;
        else if (sscanf(line, "hang %63s", failing) == 1 && !strcmp(failing, function))
            hangs = 1;
    }
    fclose(file);
    if (hangs) {
        usleep(10000);
        return read_state(state, function, gpu);
    }
    return result;
}

/* The same for a function that needs nvmlInit first. */
static int ask(State *state, const char *function, int gpu) {
    int result = read_state(state, function, gpu);
    if (result != SUCCESS)
        return result;
    return __atomic_load_n(&initialized, __ATOMIC_SEQ_CST) > 0 ? SUCCESS : UNINITIALIZED;
}

/* A handle is the GPU's index plus one: no handle is NULL. */
static int gpu_of(void *handle) {
    return (int)(long)handle - 1;
}

/* The GPU of a handle in `card`, or the code to return. */
static int ask_gpu(State *state, const char *function, void *handle, Gpu **card) {
    int gpu = gpu_of(handle);
    int result = ask(state, function, gpu);
    if (result != SUCCESS)
        return result;
    if (gpu < 0 || gpu >= state->gpu_count)
        return INVALID_ARGUMENT;
    *card = &state->gpus[gpu];
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    State state;
    int result = read_state(&state, __func__, EVERY_GPU);
    (void)flags;
    if (result == SUCCESS)
        __atomic_add_fetch(&initialized, 1, __ATOMIC_SEQ_CST);
    return result;
}

int nvmlShutdown(void) {
    if (__atomic_load_n(&initialized, __ATOMIC_SEQ_CST) <= 0)
        return UNINITIALIZED;
    __atomic_sub_fetch(&initialized, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    State state;
    int result = ask(&state, __func__, EVERY_GPU);
    if (result == SUCCESS)
        *count = state.gpu_count;
    return result;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    State state;
    Gpu *card;
    void *made = (void *)((long)index + 1);
    int result = ask_gpu(&state, __func__, made, &card);
    if (result == SUCCESS)
        *handle = made;
    return result;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    State state;
    Gpu *card;
    int result = ask_gpu(&state, __func__, handle, &card);
    if (result == SUCCESS)
        snprintf(name, length, "%s", card->name);
    return result;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    State state;
    Gpu *card;
    int result = ask_gpu(&state, __func__, handle, &card);
    if (result == SUCCESS)
        snprintf(uuid, length, "GPU-00000000-0000-0000-0000-%012d", gpu_of(handle));
    return result;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    State state;
    Gpu *card;
    int result = ask_gpu(&state, __func__, handle, &card);
    if (result == SUCCESS) {
        memory->total = card->total_mib << 20;
        memory->used = card->used_mib << 20;
        memory->free = memory->total - memory->used;
    }
    return result;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    State state;
    Gpu *card;
    int result = ask_gpu(&state, __func__, handle, &card);
    if (result == SUCCESS)
        *milliwatts = card->power_mw;
    return result;
}

int nvmlDeviceGetUtilizationRates(void *handle, Utilization *utilization) {
    State state;
    Gpu *card;
    int result = ask_gpu(&state, __func__, handle, &card);
    if (result == SUCCESS) {
        utilization->gpu = card->utilization;
        utilization->memory = card->total_mib ? (unsigned)(card->used_mib * 100 / card->total_mib) : 0;
    }
    return result;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    State state;
    Gpu *card;
    int result = ask_gpu(&state, __func__, handle, &card);
    (void)sensor;
    if (result == SUCCESS)
        *celsius = card->temperature;
    return result;
}

/* As NVML has it: too small an array is told how many there are. */
static int processes(const char *function, const char *kind, void *handle, unsigned *count, ProcessInfo *infos) {
    State state;
    Gpu *card;
    unsigned room = infos ? *count : 0, found = 0;
    int result = ask_gpu(&state, function, handle, &card);
    if (result != SUCCESS)
        return result;
    for (int i = 0; i < state.process_count; i++) {
        Process *process = &state.processes[i];
        if (process->gpu != gpu_of(handle) || strcmp(process->kind, kind))
            continue;
        if (found < room) {
            infos[found].pid = process->pid;
            infos[found].used = process->used_mib < 0 ? NOT_AVAILABLE : (unsigned long long)process->used_mib << 20;
            infos[found].gpu_instance = infos[found].compute_instance = ~0U;
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos) {
    return processes(__func__, "compute", handle, count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos) {
    return processes(__func__, "graphics", handle, count, infos);
}

/* Drivers before 510 have these alone; the same shapes. */
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *infos) {
    return processes(__func__, "compute", handle, count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *infos) {
    return processes(__func__, "graphics", handle, count, infos);
}

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
    State state;
    char path[64], found[256] = "";
    int result = ask(&state, __func__, EVERY_GPU);
    FILE *file;
    if (result != SUCCESS)
        return result;
    snprintf(path, sizeof path, "/proc/%u/comm", pid);
    file = fopen(path, "r");
    if (!file)
        return NOT_FOUND;
    if (fgets(found, sizeof found, file))
        found[strcspn(found, "\n")] = 0;
    fclose(file);
    snprintf(name, length, "%s", found);
    return SUCCESS;
}
