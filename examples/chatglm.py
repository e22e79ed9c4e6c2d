# pip install --upgrade openai
import openai
# to get proper authentication, make sure to use a valid key that's listed in
# the --api-keys flag. if no flag value is provided, the `api_key` will be ignored.
openai.api_key = "EMPTY"
openai.api_base = "http://yourserverip:8000/v1"

model = "chatglm2-6b"  # 模型文件地址，文件夹名字
prompt = "你好"

# create a completion
completion = openai.Completion.create(model=model, prompt=prompt, max_tokens=64)
# print the completion
print(prompt + completion.choices[0].text)

# create a chat completion
completion = openai.ChatCompletion.create(
  model=model,
  messages=[{"role": "user", "content": "Hello! What is your name?"}]
)
# print the completion
print(completion.choices[0].message.content)

#########################类似opena的代码##################################
import openai
def create(**args):
    openai.api_key = "EMPTY"
    openai.api_base = "http://hostserver:8000/v1"

    try:
        result = openai.ChatCompletion.create(**args)
    except openai.error.RateLimitError:
        result = create(**args)
    
    return result

def chat(mess):
    responde = create(
        model="chatglm2-6b",
        messages=mess
    )

    res = responde['choices'][0]['message']['content']
    return res
