/* Stand-ins of the CANN libraries that torch-npu links to, so that it loads on a machine without any.
 *
 * Memory of a device is this process's own, copies are memcpy, streams and events are numbers whose work is done at once, and every
 * computation is refused: whoever wants values computes them elsewhere (npu_values.py). What it says of the device (an Ascend910B3
 * with 60 of 64 GiB free, EMBERL_STUB_DEVICES of them) is invented. Built twice: -DRUNTIME is libascendcl, -DCOMPILER libacl_op_compiler;
 * with neither it is empty, for the libraries of which torch-npu needs only that they are there.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IDLE(name) int name(void) { return 0; }

int emberl_stub;

#ifdef COMPILER
int aclSetCompileopt(int option, const char *value) { return 0; }
size_t aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char *value, size_t size) {
    if (value && size) value[0] = 0;
    return 0;
}
IDLE(aclopSetCompileFlag) IDLE(aclGenGraphAndDumpForOp) IDLE(aclopStartDumpArgs) IDLE(aclopStopDumpArgs)
IDLE(aclCreateGraphDumpOpt) IDLE(aclDestroyGraphDumpOpt)
#endif

#if defined(COMPILER) || defined(RUNTIME)
int aclrtGetSysParamOpt(int option, long *value) { *value = 0; return 0; }
int aclrtSetSysParamOpt(int option, long value) { return 0; }
int aclrtCtxGetSysParamOpt(int option, long *value) { *value = 0; return 0; }
int aclrtCtxSetSysParamOpt(int option, long value) { return 0; }
#endif

#ifdef RUNTIME
enum { OUT_OF_MEMORY = 207001, REFUSED = 500002 };

static int current = 0;
static long next_handle = 1; /* of streams and events, which hold nothing */

static int give(void **place, size_t size, size_t alignment) {
    *place = aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    return *place ? 0 : OUT_OF_MEMORY;
}
static int handle(void **place) { *place = (void *)next_handle++; return 0; }

/* the device */
int aclInit(const char *path) { return 0; }
int aclFinalize(void) { return 0; }
const char *aclGetRecentErrMsg(void) { return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
int aclrtSetDevice(int device) { current = device; return 0; }
int aclrtGetDevice(int *device) { *device = current; return 0; }
int aclrtResetDevice(int device) { return 0; }
int aclrtGetDeviceCount(unsigned *count) {
    const char *given = getenv("EMBERL_STUB_DEVICES");
    *count = given ? atoi(given) : 1;
    return 0;
}
int aclGetDeviceCapability(unsigned device, int what, long *value) { *value = 24; return 0; }
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) {
    *free_bytes = 60ull << 30;
    *total = 64ull << 30;
    return 0;
}
int aclrtDeviceCanAccessPeer(int *yes, int a, int b) { *yes = 1; return 0; }
int aclrtDeviceEnablePeerAccess(int device, unsigned flags) { return 0; }
int aclrtGetCurrentContext(void **context) { *context = (void *)1; return 0; }
int aclrtSetCurrentContext(void *context) { return 0; }

/* memory */
int aclrtMalloc(void **place, size_t size, int policy) { return give(place, size, 512); }
int aclrtMallocAlign32(void **place, size_t size, int policy) { return give(place, size, 512); }
int aclrtMallocWithCfg(void **place, size_t size, int policy, void *config) { return give(place, size, 512); }
int aclrtMallocHost(void **place, size_t size) { return give(place, size, 64); }
int aclrtFree(void *place) { free(place); return 0; }
int aclrtFreeHost(void *place) { free(place); return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size);
    return 0;
}
int aclrtMemset(void *to, size_t room, int value, size_t size) { memset(to, value, size); return 0; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream) { memset(to, value, size); return 0; }

/* streams and events: what is recorded has happened */
int aclrtCreateStream(void **stream) { return handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flags) { return handle(stream); }
int aclrtDestroyStream(void *stream) { return 0; }
int aclrtSynchronizeStream(void *stream) { return 0; }
int aclrtStreamWaitEvent(void *stream, void *event) { return 0; }
int aclrtCreateEventExWithFlag(void **event, unsigned flags) { return handle(event); }
int aclrtDestroyEvent(void *event) { return 0; }
int aclrtRecordEvent(void *event, void *stream) { return 0; }
int aclrtSynchronizeEvent(void *event) { return 0; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 1; return 0; }

/* computation */
int aclopCompileAndExecute(void) {
    fprintf(stderr, "the stand-in of CANN computes nothing\n");
    return REFUSED;
}

/* what torch-npu looks up when it is loaded, and what says "done" to it */
IDLE(MsprofGetHashId) IDLE(MsprofRegisterCallback) IDLE(MsprofReportAdditionalInfo) IDLE(MsprofReportApi)
IDLE(MsprofReportCompactInfo) IDLE(MsprofSysCycleTime) IDLE(aclAppLog) IDLE(aclCreateDataBuffer)
IDLE(aclCreateTensorDesc) IDLE(aclDestroyDataBuffer) IDLE(aclDestroyTensorDesc) IDLE(aclGetTensorDescDimV2)
IDLE(aclGetTensorDescFormat) IDLE(aclGetTensorDescNumDims) IDLE(aclGetTensorDescType) IDLE(aclSetTensorDescName)
IDLE(aclSetTensorFormat) IDLE(aclSetTensorPlaceMent) IDLE(aclSetTensorShape) IDLE(aclmdlFinalizeDump)
IDLE(aclmdlInitDump) IDLE(aclmdlRIAddCondTask) IDLE(aclmdlRICaptureBegin) IDLE(aclmdlRICaptureEnd)
IDLE(aclmdlRICaptureGetInfo) IDLE(aclmdlRICaptureTaskGrpBegin) IDLE(aclmdlRICaptureTaskGrpEnd)
IDLE(aclmdlRICaptureTaskUpdateBegin) IDLE(aclmdlRICaptureTaskUpdateEnd) IDLE(aclmdlRICaptureThreadExchangeMode)
IDLE(aclmdlRICaptureToModelRIBegin) IDLE(aclmdlRICondHandleCreate) IDLE(aclmdlRICondHandleGetCondPtr)
IDLE(aclmdlRIDebugJsonPrint) IDLE(aclmdlRIDebugPrint) IDLE(aclmdlRIDestroy) IDLE(aclmdlRIExecuteAsync)
IDLE(aclmdlRIGetId) IDLE(aclmdlSetDump) IDLE(aclopCreateAttr) IDLE(aclopDestroyAttr) IDLE(aclopSetAttrBool)
IDLE(aclopSetAttrDataType) IDLE(aclopSetAttrFloat) IDLE(aclopSetAttrInt) IDLE(aclopSetAttrListBool)
IDLE(aclopSetAttrListFloat) IDLE(aclopSetAttrListInt) IDLE(aclopSetAttrListListInt) IDLE(aclopSetAttrString)
IDLE(aclprofCreateConfig) IDLE(aclprofCreateStepInfo) IDLE(aclprofDestroyConfig) IDLE(aclprofDestroyStepInfo)
IDLE(aclprofFH) IDLE(aclprofFinalize) IDLE(aclprofGetStepTimestamp) IDLE(aclprofGetSupportedFeatures)
IDLE(aclprofGetSupportedFeaturesV2) IDLE(aclprofIL) IDLE(aclprofInit) IDLE(aclprofMH) IDLE(aclprofMarkEx)
IDLE(aclprofRegisterDeviceCallback) IDLE(aclprofSH) IDLE(aclprofSetConfig) IDLE(aclprofStart) IDLE(aclprofStop)
IDLE(aclprofWL) IDLE(aclprofWarmup) IDLE(aclrtBinaryGetFunction) IDLE(aclrtBinaryLoadFromData) IDLE(aclrtCmoAsync)
IDLE(aclrtCreateEventWithFlag) IDLE(aclrtDestroyStreamForce) IDLE(aclrtDeviceGetBareTgid) IDLE(aclrtDeviceGetUuid)
IDLE(aclrtDeviceTaskAbort) IDLE(aclrtEventGetTimestamp) IDLE(aclrtFreePhysical) IDLE(aclrtGetDeviceInfo)
IDLE(aclrtGetDeviceUtilizationRate) IDLE(aclrtGetErrorVerbose) IDLE(aclrtGetFunctionAddr)
IDLE(aclrtGetHardwareSyncAddr) IDLE(aclrtGetLastError) IDLE(aclrtGetLogicDevIdByUserDevId)
IDLE(aclrtGetMemUceInfo) IDLE(aclrtGetMemUsageInfo) IDLE(aclrtGetPrimaryCtxState) IDLE(aclrtGetResInCurrentThread)
IDLE(aclrtGetStreamOverflowSwitch) IDLE(aclrtHostRegister) IDLE(aclrtHostRegisterV2) IDLE(aclrtHostUnregister)
IDLE(aclrtIpcGetEventHandle) IDLE(aclrtIpcMemClose) IDLE(aclrtIpcMemGetExportKey) IDLE(aclrtIpcMemImportByKey)
IDLE(aclrtIpcMemSetImportPid) IDLE(aclrtIpcOpenEventHandle) IDLE(aclrtLaunchCallback) IDLE(aclrtLaunchHostFunc)
IDLE(aclrtLaunchKernelWithHostArgs) IDLE(aclrtMallocHostWithCfg) IDLE(aclrtMallocPhysical) IDLE(aclrtMapMem)
IDLE(aclrtMemExportToShareableHandle) IDLE(aclrtMemImportFromShareableHandle)
IDLE(aclrtMemSetPidToShareableHandle) IDLE(aclrtMemUceRepair) IDLE(aclrtMemcpyAsyncWithCondition)
IDLE(aclrtMemcpyBatch) IDLE(aclrtMemcpyBatchAsync) IDLE(aclrtPeekAtLastError) IDLE(aclrtPointerGetAttributes)
IDLE(aclrtProcessReport) IDLE(aclrtQueryEventStatus) IDLE(aclrtQueryEventWaitStatus) IDLE(aclrtReleaseMemAddress)
IDLE(aclrtRepairError) IDLE(aclrtReserveMemAddress) IDLE(aclrtResetDeviceResLimit) IDLE(aclrtResetEvent)
IDLE(aclrtResetStreamResLimit) IDLE(aclrtSetDeviceResLimit) IDLE(aclrtSetDeviceSatMode)
IDLE(aclrtSetOpExecuteTimeOut) IDLE(aclrtSetOpExecuteTimeOutV2) IDLE(aclrtSetOpWaitTimeout)
IDLE(aclrtSetStreamAttribute) IDLE(aclrtSetStreamFailureMode) IDLE(aclrtSetStreamOverflowSwitch)
IDLE(aclrtSetStreamResLimit) IDLE(aclrtStreamGetId) IDLE(aclrtStreamQuery) IDLE(aclrtSubscribeReport)
IDLE(aclrtSynchronizeDevice) IDLE(aclrtSynchronizeDeviceWithTimeout) IDLE(aclrtSynchronizeStreamWithTimeout)
IDLE(aclrtUnSubscribeReport) IDLE(aclrtUnmapMem) IDLE(aclrtUnuseStreamResInCurrentThread)
IDLE(aclrtUseStreamResInCurrentThread) IDLE(aclrtValueWait) IDLE(aclrtValueWrite) IDLE(rtDevBinaryRegister)
IDLE(rtFunctionRegister) IDLE(rtGetC2cCtrlAddr) IDLE(rtKernelLaunch)
#endif
