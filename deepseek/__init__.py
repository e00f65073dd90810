"""The model side of ESFT: everything that touches a mixture-of-experts model.

    experts.py, grouped_gemm.py     find the experts, put the trained ones first, compute with them
    masters.py, frozen.py           fp32 masters of bf16 parameters; frozen experts in less memory
    routing.py                      count where the router sends tokens
    loading.py, partial_loading.py  open a model, or only some of its experts
    adapters.py, shards.py, checkpoint_files.py, files.py    adapters and checkpoints on disk
    expert_parallel.py, placement.py, process_groups.py, gradient_sync.py    the experts on several ranks
    modeling.py                     the first DeepSeekMoE, which transformers lacks

`esft.py` is the method itself and the interface of this package.
"""

import logging

# peft and transformers' Trainer import bitsandbytes, which then warns that it lacks a kernel of its own. Nothing here
# calls that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
