"""`python -m tracking ui`: the MLflow UI on the result database."""

import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Annotated

import typer

from tracking import EXPERIMENTS, Store, StoreError, open_store

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def tracking() -> None:
    """Look after the result database."""


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="on 127.0.0.1")] = 5000,
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of the result database; mlruns/ unless given")
    ] = None,
) -> None:
    """Serve the MLflow UI on loopback until Ctrl-C, and print the links that open the runs."""
    try:
        store = open_store(tracking_uri)
    except StoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: take the server along
    if store.uri.startswith("http"):  # a server itself
        _print_links(store, store.uri)
        return
    base = f"http://127.0.0.1:{port}"
    server = _serve(store, port)
    try:  # from here on nothing may leave the server behind
        if not _answers(server, f"{base}/health"):
            print(f"Error: no server on {base}; is the port taken? Name another with --port", file=sys.stderr)
            raise typer.Exit(1)
        _print_links(store, base)
        print("Ctrl-C ends the server", flush=True)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def _print_links(store: Store, address: str) -> None:
    for task in EXPERIMENTS:
        if store.experiment_id(task) is not None:
            print(f"{task}  {store.runs_link(task, address)}", flush=True)


def _serve(store: Store, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri, "--workers", "1"]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    return subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _answers(server: "subprocess.Popen[bytes]", address: str) -> bool:
    """Wait until the server answers; False where it ended or 60 s have passed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except (OSError, http.client.HTTPException):
            time.sleep(0.3)
        else:
            return server.poll() is None  # else another program answers on that port
    return False


if __name__ == "__main__":
    app()
