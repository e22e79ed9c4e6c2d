"""The classic script for openai 0.28: completion, chat, streams, embeddings, models.

pip install openai==0.28.1
OPENAI_API_BASE=http://localhost:8000/v1 OPENAI_API_KEY=EMPTY python examples/openai_0_28.py chatglm2-6b
"""

import sys

import openai

model = sys.argv[1] if len(sys.argv) > 1 else "chatglm2-6b"
prompt = "你好"

completion = openai.Completion.create(model=model, prompt=prompt, max_tokens=64)
print(prompt + completion.choices[0].text)

messages = [{"role": "user", "content": "Hello! What is your name?"}]
completion = openai.ChatCompletion.create(model=model, messages=messages, max_tokens=64)
print(completion.choices[0].message.content)


def create(**args: object) -> dict:
    """The retry by recursion that many scripts of that time have."""
    try:
        return openai.ChatCompletion.create(**args)
    except openai.error.RateLimitError:
        return create(**args)


answer = create(model=model, messages=messages, max_tokens=16, temperature=0)
whole = answer["choices"][0]["message"]["content"]

stream = create(model=model, messages=messages, max_tokens=16, temperature=0, stream=True)
deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream]
assert "".join(deltas) == whole, (deltas, whole)

pieces = [
    chunk.choices[0].text
    for chunk in openai.Completion.create(model=model, prompt=prompt, max_tokens=16, temperature=0, stream=True)
]
assert (
    "".join(pieces)
    == openai.Completion.create(model=model, prompt=prompt, max_tokens=16, temperature=0).choices[0].text
)

embedding = openai.Embedding.create(model=model, input=["你好", "Hello"])
assert len(embedding.data) == 2
assert all(isinstance(number, float) for number in embedding.data[0].embedding)

by_engine = openai.Completion.create(engine=model, prompt=prompt, max_tokens=4)
assert by_engine.usage.completion_tokens <= 4

assert model in [card.id for card in openai.Model.list().data]
try:
    openai.ChatCompletion.create(model="nobody-serves-this", messages=messages)
except openai.error.InvalidRequestError as error:
    assert error.code == "model_not_found", error
else:
    raise AssertionError("an unknown model was answered")
print("openai", openai.VERSION, "works")
