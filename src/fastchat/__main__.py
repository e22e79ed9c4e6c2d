"""`python3 -m fastchat <command>`, the same as `fastchat <command>`."""

from fastchat.serve.main import main

if __name__ == "__main__":
    main()
