"""Compiles FlexAttention for a GPU that is not there; prints the shared memory of its kernel and the limit, in bytes.

    PYTHONPATH=DIR python tests/flex_codegen.py 8.6 128 float32

DIR holds a CUDA build of torch with triton. A GPU of that compute capability is pretended: the kernel is generated and
compiled, and not launched.
"""

import sys
import types

import torch

LIMITS = {"8.0": 166912, "8.6": 101376, "8.9": 101376, "9.0": 232448, "10.0": 232448, "12.0": 101376}
CAPABILITY = tuple(map(int, sys.argv[1].split(".")))
LIMIT, DIM, DTYPE = LIMITS[sys.argv[1]], int(sys.argv[2]), getattr(torch, sys.argv[3])

PROPERTIES = types.SimpleNamespace(
    **{"name": "pretended", "major": CAPABILITY[0], "minor": CAPABILITY[1], "total_memory": 2**36, "warp_size": 32},
    **{"multi_processor_count": 132, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048},
    **{"max_threads_per_block": 1024, "gcnArchName": "", "uuid": "0", "L2_cache_size": 2**25, "is_integrated": 0},
    **{"shared_memory_per_block": 49152, "shared_memory_per_block_optin": LIMIT},
    shared_memory_per_multiprocessor=LIMIT + 1024,
)


class Guard:
    """Stands for the context of the pretended GPU."""

    def __init__(self, *_):
        self.idx = 0

    def __enter__(self):
        return 0

    def __exit__(self, *_):
        return False


def constant(value):
    return lambda *_, **__: value


def pretend():
    """Replaces what asks the driver, before anything of the compiler is imported."""
    torch._C._ensureCUDADeviceGuardSet()
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    state = torch.zeros(16, dtype=torch.uint8, device="cpu")
    found = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES}
    found.update({"get_device_capability": CAPABILITY, "get_device_name": "pretended", "is_bf16_supported": True})
    found.update({"synchronize": None, "_lazy_init": None, "is_initialized": False, "set_device": None})
    found.update({"current_stream": stream, "get_rng_state": state, "set_rng_state": None})
    for name, value in found.items():
        setattr(torch.cuda, name, constant(value))
    torch.cuda.device = torch.cuda._DeviceGuard = Guard
    torch.cuda.random._lazy_init, torch.cuda.random.get_rng_state = constant(None), constant(state)
    for name in ("getCurrentRawStream", "exchangeDevice", "maybeExchangeDevice", "getDevice", "setDevice"):
        setattr(torch._C, f"_cuda_{name}", constant(0))
    torch._C._cuda_getDeviceCount = constant(1)
    from torch._inductor.fx_passes import fuse_attention, pad_mm

    fuse_attention._sfdp_init = pad_mm._pad_mm_init = constant(None)


def pretend_triton():
    """Gives triton the pretended GPU, and has it print what it compiled instead of launching it."""
    import triton
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": LIMIT, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    driver = types.SimpleNamespace(
        get_current_target=constant(GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)),
        get_current_device=constant(0),
        get_active_torch_device=constant(torch.device("cuda", 0)),
        get_current_stream=constant(0),
        utils=types.SimpleNamespace(get_device_properties=constant(limits)),
    )
    triton.runtime.driver.set_active(driver)
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(config, name):
            setattr(config, name, False)
    config.compile_threads, config.force_disable_caches = 1, True
    for module, name in ((triton_helpers, "gpu"), (triton_helpers, "cpu"), (triton_heuristics, "gpu")):
        setattr(module, f"set_driver_to_{name}", constant(None))

    def launchers(self):
        for result in self.compile_results:
            if "flex" in self.fn.__name__:
                print(f"shared memory {result.kernel.metadata.shared} of {LIMIT}", flush=True)
        self.launchers = [constant(None)]

    triton_heuristics.CachingAutotuner._make_launchers = launchers
    triton_heuristics.CachingAutotuner._dynamic_scale_rblock = constant(None)


def main():
    pretend()
    pretend_triton()
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fairseq_alibi.core.attention_inputs import AttentionInputs, LinearBias
    from fairseq_alibi.core.flex_attention import flex_blocks

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        q, k, v = (torch.empty(1000, 2, 8, DIM, device="cuda", dtype=DTYPE).permute(1, 2, 0, 3) for _ in range(3))
        try:
            flex_blocks(q, k, v, AttentionInputs(bias=LinearBias(torch.empty(8, device="cuda"))))
        except RuntimeError as error:  # there is nothing to launch it
            print(" ".join(str(error).split())[:200])


main()
