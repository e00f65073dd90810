"""Merge an adapter into its base and save a plain checkpoint, which transformers opens without this library.

python docs/examples/score_and_select.py
python docs/examples/train_with_a_plain_loop.py
python docs/examples/merge_and_save.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from esft import add_adapter, load_base_model, merge, unload


def main(
    base: str = "results/models/tiny",
    adapter: str = "results/runs/examples/adapter",
    output: str = "results/runs/examples/merged",
) -> str:
    model, tokenizer = load_base_model(base, dtype="float32")
    add_adapter(model, adapter)  # checks that the adapter fits this base before it changes anything
    unload(model)  # the base again, bit for bit: so you can switch between adapters
    add_adapter(model, adapter)
    merge(model).save_pretrained(output)
    tokenizer.save_pretrained(output)

    plain = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=False)
    question = "Give the judgment.\nCase: On saturday in Dublin Clara Voss climbed over the fence of Jonas Marsh. "
    question += "The accused was never in court and denied it."
    messages = [{"role": "user", "content": question}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = plain.generate(**batch, max_new_tokens=48, do_sample=False)
    answer = tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    return answer


if __name__ == "__main__":
    main()
