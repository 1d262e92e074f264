"""Mutated inputs by number: each must end in success or in one sentence and exit status 2.

    python tests/fuzz                 # all 10,000; `make fuzz` does the same
    python tests/fuzz --count 100     # the first hundred, which the tests run
    python tests/fuzz 1234 77         # these again, each with its command, output and traceback
    python tests/fuzz 1234 --keep DIR # the files of the case stay in DIR

A case is a command line and the files that it reads. Its number is the seed of everything random in it, so it can be
made again alone. A case fails if the command raises anything but `DetailFlowError`, takes over 30 seconds or 2 GiB,
starts a process, writes outside its own folder or to its inputs, or reads a file that nobody named.

`stock` has the sound inputs, `mutate` what is done to them; `images`, `folders`, `models` and `words` make the cases,
and `cases` picks one; `guard` watches, `worker` runs cases in a process of its own, `runner` starts workers and ends
those that hang.
"""
