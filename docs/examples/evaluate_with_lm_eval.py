"""Compare a base with its adapter by lm-eval, EleutherAI's harness, in Python.

pip install lm_eval
python docs/examples/score_and_select.py
python docs/examples/train_with_a_plain_loop.py
python docs/examples/evaluate_with_lm_eval.py
"""

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from esft import add_adapter, load_base_model


def make_task(data: str) -> dict:
    """Return a task for lm-eval: how do the answers of a file end? Names, as "mmlu", are tasks as well."""
    return {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "gen_prefix": "{{answers[0].rsplit(' ', 1)[0]}}",  # how the answer begins
        "doc_to_target": " {{answers[0].rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }


def main(
    base: str = "results/models/tiny",
    adapter: str = "results/runs/examples/adapter",
    data: str = "datasets/eval/law.jsonl",
    limit: int = 50,
) -> dict[str, dict]:
    model, tokenizer = load_base_model(base, dtype="float32")
    lm = HFLM(model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32", trust_remote_code=False)
    tasks = TaskManager(include_defaults=False)  # without lm-eval's own tasks, which take seconds to list
    found = {}
    for name in ("base", "adapter"):
        if name == "adapter":
            add_adapter(model, adapter)
        results = simple_evaluate(
            lm, tasks=[make_task(data)], task_manager=tasks, limit=limit, apply_chat_template=True
        )
        found[name] = results["results"]["last_word"]
        print(f"{name}: perplexity {found[name]['perplexity,none']:.2f}, acc {found[name]['acc,none']:.2f}")
    return found


if __name__ == "__main__":
    main()
