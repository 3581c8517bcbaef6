"""Run a command; add its wall time in seconds and its peak memory in MB (with all it started) as a line to a file.

usage: timed.py FILE COMMAND...
"""
import resource
import subprocess
import sys
import time

begin = time.perf_counter()
code = subprocess.run(sys.argv[2:], check=False).returncode
seconds = time.perf_counter() - begin
megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
with open(sys.argv[1], "a") as times:
    print(f"{seconds:.2f} {megabytes:.0f}", file=times)
sys.exit(code)
