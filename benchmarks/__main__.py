"""`python -m benchmarks compare A B`: two commits, measured in turns on this machine; other commands are run.py's."""

from benchmarks.compare import compare
from benchmarks.run import app

app.command()(compare)

if __name__ == "__main__":
    app()
