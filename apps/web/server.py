"""`fastdit web`: serve the page to this machine, or to users with passwords."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.errors import UserError
from fastdit.apps.render.settings import Settings
from fastdit.apps.web.limits import Limits
from fastdit.apps.web.passwords import PasswordGate, hashed, read_users
from fastdit.apps.web.same_origin import SameOrigin
from fastdit.apps.web.uploads import Uploads


def web(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the clips, that of `render`; created if missing.")] = Path(
        "renders"
    ),
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model to offer besides the embedded one; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; needs --auth if others can reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 7860,
    auth: Annotated[
        Path | None,
        typer.Option(help="File of name:password or name:hash lines. Each user then has a folder of their own under --out."),
    ] = None,
    make_hash: Annotated[
        bool, typer.Option("--hash", help="Ask for a password, print its hash for --auth, and exit.", show_default=False)
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_frames: Annotated[int, typer.Option(help="Most frames of a clip.")] = 241,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of a frame, height x width.")] = 1280 * 720,
    max_steps: Annotated[int, typer.Option(help="Most denoising steps of a clip.")] = 100,
    max_each: Annotated[int, typer.Option(help="Most clips that one user may have waiting.")] = 4,
    max_queue: Annotated[int, typer.Option(help="Most clips of all users that may be waiting.")] = 100,
    max_upload: Annotated[int, typer.Option(help="Largest picture to start from, in MB.")] = 20,
    max_uploads: Annotated[int, typer.Option(help="Most MB of uploaded pictures kept at once, of all users.")] = 1000,
) -> None:
    """Open a page in the browser: text to video, dense and fast side by side."""
    if make_hash:
        typer.echo(hashed(typer.prompt("password", hide_input=True, confirmation_prompt=True, err=True)))
        return
    sizes = {"frames": max_frames, "pixels": max_pixels, "steps": max_steps, "each": max_each, "queue": max_queue}
    for name, most in (sizes | {"upload": max_upload, "uploads": max_uploads}).items():
        if most < 1:
            raise UserError(f"--max-{name} must be at least 1, got {most}", 2)
    if not 0 <= port < 65536:
        raise UserError(f"--port must be from 0 to 65535, got {port}", 2)
    users = None if auth is None else read_users(auth)
    if users is None and not loopback(host):
        raise UserError(f"--host {host} can be reached by others: list the users who may log in, with --auth FILE", 2)
    Settings(prompt="x", device=device, dtype=dtype).check()
    serve(
        out.resolve(),
        model or [],
        host,
        port,
        users,
        {"device": device, "dtype": dtype},
        sizes | {"upload_mb": max_upload},
        max_uploads,
    )


def serve(
    out: Path,
    models: list[str],
    host: str,
    port: int,
    users: dict[str, str] | None,
    fixed: dict[str, Any],
    limits: dict[str, int],
    uploads_mb: int,
) -> None:
    """Serve until interrupted. Raises UserError if Gradio is missing, or the port or folder cannot be used."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}): choose another folder with --out") from None
    # Gradio reads these at import: served files lie inside the output folder, and nothing is sent to anybody.
    os.environ["GRADIO_TEMP_DIR"] = str(out / ".served")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs Gradio: pip install 'fastdit[ui]'") from None
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.staticfiles import StaticFiles

    from fastdit.apps.web import tabs
    from fastdit.apps.web.page import Page
    from fastdit.apps.web.queue import EMBEDDED, Studio

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from None
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it only on sockets that it opened itself
    names: dict[str, str | None] = {EMBEDDED: None} | {name: name for name in models}
    studio = Studio(out, names, Limits(**limits), fixed)
    studio.warm.result()  # a model that cannot be loaded is reported before the page opens
    page = Page(studio, users is not None)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Uploads, each=limits["upload_mb"] << 20, most=uploads_mb << 20)
    app.add_middleware(SameOrigin)  # the last one added comes first
    if users is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])
    # Gradio compresses its scripts again for every visitor, which takes longer on two cores than sending them
    scripts = Path(gr.__file__).parent / "templates" / "frontend" / "assets"
    if scripts.is_dir():
        app.mount("/assets", StaticFiles(directory=scripts))
    gr.mount_gradio_app(
        app, tabs.build(page), "/", auth=None if users is None else PasswordGate(users).opens, run_history=False,
        max_file_size=f"{limits['upload_mb']}mb", show_error=False, ssr_mode=False, server_name=host, server_port=port,
        **tabs.looks(),
    )  # fmt: skip
    at = listening.getsockname()[1]
    typer.echo(f"fastdit: http://{f'[{host}]' if ':' in host else host}:{at}  (clips go to {out}; Ctrl-C ends it)")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    try:
        server.run(sockets=[listening])
    finally:
        studio.close()


def loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
