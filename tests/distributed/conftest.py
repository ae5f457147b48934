"""The files here are programs that tests/test_distributed.py starts, with no tests inside."""

collect_ignore_glob = ["*.py"]
