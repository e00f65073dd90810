r"""Expert-parallel training: train.py with `ep_size=auto`.

    torchrun --nproc-per-node=8 train_ep.py --base_model_path=M --train_dataset=D --train_config=configs/base.yaml \
        --expert_config=results/expert_configs/D.json --output_dir=results/checkpoints/D --save_opt_states \
        [key=value ...]

Each copy of the model lies on ep_size processes: each holds a share of every layer's experts, and all the rest. There
are world_size / ep_size copies. `auto` takes the smallest ep_size whose weights and states are expected to fit on the
GPUs, and says so; on a CPU it is 1. What is trained, and all losses, are those of one process.
"""

import utils
from train import main

if __name__ == "__main__":
    utils.run_cli(lambda: main(defaults={"ep_size": "auto"}, description=__doc__))
