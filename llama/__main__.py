from llama.interrupt import exit_on_interrupt

with exit_on_interrupt():
    from llama.cli.main import main

main()
