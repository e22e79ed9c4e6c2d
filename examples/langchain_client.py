"""langchain-openai: chat, stream, batch, asynchronous, embeddings.

pip install langchain-openai
OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=EMPTY python examples/langchain_client.py chatglm2-6b
"""

import asyncio
import sys
from importlib.metadata import version

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

model = sys.argv[1] if len(sys.argv) > 1 else "chatglm2-6b"
chat = ChatOpenAI(model=model, temperature=0, max_tokens=24)
messages = [SystemMessage("Be brief."), HumanMessage("Hello!"), AIMessage("Hi."), HumanMessage("What is your name?")]

whole = chat.invoke(messages)
print(whole.content)
assert whole.usage_metadata["output_tokens"] <= 24
assert whole.response_metadata["finish_reason"] in ("stop", "length")

chunks = list(chat.stream(messages))
assert "".join(chunk.content for chunk in chunks) == whole.content

first, second = chat.batch([messages, [HumanMessage("你好")]])
assert first.content == whole.content
assert second.content

chain = ChatPromptTemplate.from_messages([("human", "Translate {text}.")]) | chat.bind(stop=["\n\n"])
assert "\n\n" not in chain.invoke({"text": "bread"}).content


async def ask_asynchronously() -> None:
    """Whole and streamed at once."""
    answer, text = await asyncio.gather(chat.ainvoke(messages), joined())
    assert answer.content == text == whole.content


async def joined() -> str:
    return "".join([chunk.content async for chunk in chat.astream(messages)])


asyncio.run(ask_asynchronously())

# A model behind a name that is not OpenAI's: its text is sent as it is, not as token ids of OpenAI's tokenizer.
embeddings = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(["你好", "Hello"])
assert len(vectors) == 2
assert sum(number * number for number in vectors[0]) - 1 < 1e-3
assert len(embeddings.embed_query("Hello")) == len(vectors[1])

completion = OpenAI(model=model, temperature=0, max_tokens=8).invoke("Once upon a time")
assert isinstance(completion, str)
print("langchain-openai", version("langchain-openai"), "works")
