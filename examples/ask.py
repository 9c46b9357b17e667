"""Ask one question about one image and stream the answer.

python examples/ask.py MODEL IMAGE "What is in this picture?"
"""

import sys

import llava_fast

if len(sys.argv) != 4:
    sys.exit(__doc__)
model = llava_fast.load(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": sys.argv[3]}]
request = {"messages": [{"role": "user", "content": content}], "images": [sys.argv[2]]}
for piece in model.stream(request, max_new_tokens=256):
    print(piece, end="", flush=True)
print()
