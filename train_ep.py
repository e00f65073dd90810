r"""Expert-parallel training: train.py with `ep_size=auto`.

    torchrun --nproc-per-node=8 train_ep.py --base_model_path=M --train_dataset=D --train_config=configs/base.yaml \
        --expert_config=results/expert_configs/D.json --output_dir=results/checkpoints/D --save_opt_states \
        [key=value ...]

A replica of the model lies on ep_size processes, each with its share of every layer's experts and all else; world_size
= ep_size x replicas. `auto` takes the smallest ep_size whose weights and states fit, and says so. What is trained, and
all losses, are those of one process.
"""

import utils
from train import main

if __name__ == "__main__":
    utils.run_cli(lambda: main(defaults={"ep_size": "auto"}, description=__doc__))
