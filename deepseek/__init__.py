"""The model side of ESFT: everything that touches a mixture-of-experts model.

`esft.py` is the method itself and the interface of this package. docs/architecture.md lists the files.
"""

import logging

# peft and transformers' Trainer import bitsandbytes, which then warns that it lacks a kernel of its own. Nothing here
# calls that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
