"""Answer a batch of different requests: text only, one image, and two images.

python examples/batch.py MODEL IMAGE OTHER_IMAGE
"""

import sys

import llava_fast

if len(sys.argv) != 4:
    sys.exit(__doc__)
model = llava_fast.load(sys.argv[1])


def ask(text: str, *images: str) -> dict:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "images": list(images)}


requests = [
    ask("What is a vision-language model?"),
    ask("What is in this picture?", sys.argv[2]),
    ask("How do these two differ?", sys.argv[2], sys.argv[3]),
]
for answer in model.generate(requests, max_new_tokens=64):
    print(f"{answer.usage.prompt_tokens} tokens, {answer.usage.visual_tokens} of them visual: {answer.text}")
