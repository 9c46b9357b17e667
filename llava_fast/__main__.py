"""`python -m llava_fast` is the llava-fast command."""

from llava_fast.cli.main import main

main()
