"""For all tests: Ctrl-C means in the processes they start what it means in a terminal."""

import signal

# A test run that was itself started in the background ignores SIGINT, and its children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
