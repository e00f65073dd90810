"""show_data.py prints documents of every data set that is named."""

import pytest

from deepseek.files import write_jsonl
from scripts import show_data


@pytest.mark.parametrize("weights", [("", ""), (":0.2", ":0.8")])
def test_each_set_is_shown(weights, tmp_path, tiny_model_dir, capsys):
    for name in ("one", "two"):
        rows = [{"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}]}] * 9
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    both = ",".join(f"{tmp_path / name}.jsonl{weight}" for name, weight in zip(("one", "two"), weights))
    show_data.main([both, f"--model={tiny_model_dir}", "--n_samples=2"])
    told = capsys.readouterr().out
    assert [told.count(f"{name}.jsonl:") for name in ("one", "two")] == [2, 2]
    show_data.main([f"{tmp_path / 'two'}.jsonl", f"--model={tiny_model_dir}"])
    assert capsys.readouterr().out.count("two.jsonl:") == 3
