"""For all tests. torch's idle threads must sleep soon, or a suite takes minutes on a busy machine."""

from tokenstep.threads import let_idle_threads_sleep

let_idle_threads_sleep()  # before any test imports torch
