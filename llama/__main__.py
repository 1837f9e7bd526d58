import sys

try:
    from llama.cli import main
except KeyboardInterrupt:
    sys.exit(130)

main()
