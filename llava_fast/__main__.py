"""`python -m llava_fast` is the llava-fast command."""

from llava_fast.cli import main

main()
