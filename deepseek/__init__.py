"""Model integration: find the experts of a model, train a chosen few of them, at full speed."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here calls
