"""Chat templates that write what those of published families write, with the tokens that they need."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """template: of Jinja. special: its special tokens. end: what ends an answer. before: what begins it."""

    template: str
    special: str
    end: str
    before: str = ""
    bos: str | None = None
    eos: str | None = None
    plain: str = ""  # tokens that are added, but not special


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SPLIT = (  # the reasoning and the answer of a message, from its fields or its text
    "{% set body = m.content %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in body %}"
    "{% set thought = body.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set body = body.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
CALLS = (
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + '
    "c.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}"
)
FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
        "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>", eos="<|im_end|>",
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>",
        bos="<|begin_of_text|>", eos="<|end_of_text|>",
    ),
    "deepseek_v2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}"
        "{{ m.content + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "<bos> <eos>", "<eos>", " ", "<bos>", "<eos>",
    ),
    "deepseek_v3": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|output|>' + m.content + '<|/output|>' }}"
        "{% else %}{{ '<|Assistant|>' + m.content }}{% for c in m.tool_calls or [] %}{{ '<|call|>function<|sep|>' + "
        "c.function.name + '\n```json\n' + c.function.arguments | tojson + '\n```<|/call|>' }}{% endfor %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}",
        "<bos> <eos> <|User|> <|Assistant|> <|call|> <|sep|> <|/call|> <|output|> <|/output|>", "<eos>",
        bos="<bos>", eos="<eos>",
    ),
    "deepseek_r1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' + "
        "m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|User|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        "<bos> <eos> <|User|> <|Assistant|>", "<eos>", bos="<bos>", eos="<eos>", plain="<think> </think>",
    ),
    "qwen3": Family(
        "{% if tools %}{{ '<|im_start|>system\n# Tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
        + SPLIT + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + body.lstrip('\n') }}{% else %}{{ body }}{% endif %}"
        + CALLS + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + "
        "m.content + '\n</tool_response><|im_end|>\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
        + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>", eos="<|im_end|>", plain="<think> </think>",
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<s> </s> [INST] [/INST]", "</s>", " ", "<s>", "</s>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role | replace('assistant', 'model') + '\n' + "
        "m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos> <eos> <start_of_turn> <end_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>",
    ),
    "gpt_oss": Family(
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{% if loop.last and "
        "m.reasoning_content %}{{ '<|channel|>analysis<|message|>' + m.reasoning_content + "
        "'<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|start|> <|channel|> <|message|> <|end|> <|return|> <|endoftext|>", "<|return|>",
        "<|channel|>final<|message|>", eos="<|return|>",
    ),
    "glm": Family(
        "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|endoftext|>", "", eos="<|endoftext|>",
    ),
    "phi": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>", "<|end|>", eos="<|endoftext|>",
    ),
    "llama_always": Family(  # the prompt for an answer, whether it is asked for or not
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim }}"
        "{{ '<|eot|>' }}{% endfor %}{{ '<|head|>assistant<|/head|>\n\n' }}",
        "<bos> <eos> <|head|> <|/head|> <|eot|>", "<|eot|>", bos="<bos>", eos="<eos>",
    ),
    "generation_marks": Family(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + TURN
        + "{% endif %}{% endfor %}" + ASK,
        "<|im_start|> <|im_end|>", "<|im_end|>", eos="<|im_end|>",
    ),
}  # fmt: skip
