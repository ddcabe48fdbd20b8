"""`python -m alignjax` is the console command `alignjax`."""

from alignjax.commands import main

if __name__ == '__main__':
  main.main()
