r"""Expert-parallel training: train.py with `ep_size=auto`.

    torchrun --nproc-per-node=8 train_ep.py --base_model_path=M --train_dataset=D --train_config=configs/base.yaml \
        --expert_config=results/expert_configs/D.json --output_dir=results/checkpoints/D --save_opt_states \
        [key=value ...]

ep_size processes share one copy of the experts: each holds some experts of every layer, and all other weights. There
are world_size / ep_size such copies. `auto` takes the smallest ep_size with which a step is expected to fit on the
GPUs, and says so. On a CPU it is 1. What is trained, and all losses, are those of one process.
"""

import utils
from train import main

if __name__ == "__main__":
    utils.run_cli(lambda: main(defaults={"ep_size": "auto"}, description=__doc__))
