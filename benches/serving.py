"""A server of one model on loopback, for scripts that measure it."""
import json
import os
import re
import subprocess
import threading


class Server:
    """Started when it is made; ready when that returns. `address` is where it answers."""

    def __init__(self, warm, model, threads, *flags):
        arguments = [warm, "serve", model, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-delay", "0s"]
        arguments += ["--threads", str(threads), *map(str, flags)]
        environment = {**os.environ, "NO_COLOR": "1"}
        self.warm = warm
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
        self.address = None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"grpc=(\S+)", line):
                self.address = found[1]
            if line.rstrip().endswith(" ready"):
                break
        else:
            raise SystemExit("the server did not start:\n" + "".join(said))
        # Somebody has to go on reading, or the server stops at a full pipe.
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def bench(self, *arguments):
        """What `warm bench` says of a load on this server. One of which nothing was scored is an answer, too."""
        command = [self.warm, "bench", "--addr", self.address, "--json", *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True)
        if not run.stdout:
            raise SystemExit(run.stderr)
        return json.loads(run.stdout)

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
