"""`python main.py` on a GPU host: a worker for each of its devices. The same as `python -m tasks.launch`."""

import sys

from tasks.launch import main

if __name__ == "__main__":
    sys.exit(main())
