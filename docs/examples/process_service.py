"""
A tiny job service for the documentation and its tests.

It runs commands, on loopback, for whoever asks.

The client names a job, so a submission that is sent twice is one job.

``PUT /jobs/{name}``
    ``{"command": ["program", "argument"]}`` starts it: 201; 409 when there is a job of that name.
``GET /jobs``
    ``{"instance": …, "jobs": {name: state}}``: all jobs, ``running``, ``succeeded``, ``failed``
    or ``killed``, and the instance, another one after each start: it has forgotten its jobs then.
``DELETE /jobs/{name}``
    kills it: 204, also when it has ended; 404 when there is none.
``GET /jobs/{name}/log``
    ``{"lines": […]}``: the end of what it printed.

Start it with ``python process_service.py --port 8765``. Its jobs end with it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import tempfile
from asyncio.subprocess import DEVNULL, create_subprocess_exec
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web


class Job:
    """A process, and the file that it prints to."""

    def __init__(self) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 closed with the job
        self.process: asyncio.subprocess.Process | None = None
        self.exit_code: int | None = None
        self.killed = False

    async def run(self, command: list[str]) -> None:
        where: dict[str, Any] = {"stdin": DEVNULL, "stdout": self.output, "stderr": self.output}
        try:
            self.process = await create_subprocess_exec(*command, **where, preexec_fn=os.setpgrp)
        except OSError as error:
            self.output.write(f"{error}\n".encode())
            self.exit_code = 127
            return
        if self.killed:  # while it was started
            self.kill()
        self.exit_code = await self.process.wait()

    def kill(self) -> None:
        self.killed = self.killed or self.exit_code is None
        if self.process is not None and self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def state(self) -> str:
        if self.exit_code is None:
            return "running"
        if self.killed and self.exit_code == -signal.SIGKILL:
            return "killed"
        return "failed" if self.exit_code else "succeeded"

    def last_lines(self) -> list[str]:
        size = os.fstat(self.output.fileno()).st_size
        end = os.pread(self.output.fileno(), 65536, max(0, size - 65536))
        return end.decode(errors="replace").splitlines()


class Service:
    """The requests, and the jobs that they are about."""

    def __init__(self) -> None:
        self.instance = secrets.token_hex(8)
        self.jobs: dict[str, Job] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/jobs", self.list)
        app.router.add_put("/jobs/{name}", self.create)
        app.router.add_delete("/jobs/{name}", self.delete)
        app.router.add_get("/jobs/{name}/log", self.log)
        app.cleanup_ctx.append(self.end_jobs)
        return app

    async def list(self, request: web.Request) -> web.Response:
        states = {name: job.state for name, job in self.jobs.items()}
        return web.json_response({"instance": self.instance, "jobs": states})

    async def create(self, request: web.Request) -> web.Response:
        command = (await request.json())["command"]
        name = request.match_info["name"]
        if name in self.jobs:
            return web.json_response({"error": f"there is a job {name}"}, status=409)
        job = self.jobs[name] = Job()
        task = asyncio.create_task(job.run(command))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return web.json_response({}, status=201)

    async def delete(self, request: web.Request) -> web.Response:
        self.job(request).kill()
        return web.Response(status=204)

    async def log(self, request: web.Request) -> web.Response:
        return web.json_response({"lines": self.job(request).last_lines()})

    def job(self, request: web.Request) -> Job:
        try:
            return self.jobs[request.match_info["name"]]
        except KeyError:
            raise web.HTTPNotFound(text="{}", content_type="application/json") from None

    async def end_jobs(self, app: web.Application) -> AsyncIterator[None]:
        yield
        for job in self.jobs.values():
            job.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    web.run_app(Service().app(), host="127.0.0.1", port=parser.parse_args().port)
