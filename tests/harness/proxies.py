"""Reverse proxies as Debian packages them, each in front of one address and listening on a Unix
socket: no port is taken.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.processes import Process
from tests.harness.waiting import wait_until

PROXIES = ("nginx", "caddy", "haproxy")

_NGINX = """daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{}}
http {{ access_log off; {timeouts}
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen unix:{socket};
    location / {{ proxy_pass http://{address}; }}
    location /llm/ {{ proxy_pass http://{address}/; }} }} }}
"""
_CADDY = """{{
  admin off
  auto_https off
}}
http:// {{
  bind unix/{socket}
  reverse_proxy {address} {{
    {timeouts}
  }}
}}
"""
_HAPROXY = """defaults
  mode http
  timeout connect 5s
  {timeouts}
frontend in
  bind unix@{socket}
  default_backend out
backend out
  server one {address}
"""
_FORMS = {
    "nginx": (
        _NGINX,
        "proxy_read_timeout {0}s; send_timeout {0}s;",
        ("-c", "{config}", "-e", "stderr"),
    ),
    "caddy": (
        _CADDY,
        "transport http {{\n read_timeout {0}s\n response_header_timeout {0}s\n }}",
        ("run", "--adapter", "caddyfile", "--config", "{config}"),
    ),
    "haproxy": (_HAPROXY, "timeout server {0}s\n  timeout client {0}s", ("-db", "-f", "{config}")),
}


def is_installed(proxy: str) -> bool:
    """Whether this machine has it."""
    return shutil.which(proxy) is not None


@contextmanager
def proxy_before(
    address: str, proxy: str, folder: Path, read_timeout_s: int | None = None
) -> Iterator[Path]:
    """Run the proxy in front of HOST:PORT until the context ends; yields its socket. None: the
    proxy's own timeouts.
    """
    form, timeouts, arguments = _FORMS[proxy]
    folder.mkdir()
    socket, config = folder / "socket", folder / "config"
    told = "" if read_timeout_s is None else timeouts.format(read_timeout_s)
    config.write_text(form.format(folder=folder, socket=socket, address=address, timeouts=told))
    command = [
        shutil.which(proxy) or proxy,
        *(argument.format(config=config) for argument in arguments),
    ]
    with Process(
        command,
        env={"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
    ) as process:
        wait_until(
            lambda: socket.exists() or process.exit_code is not None, 20.0, f"{proxy} listens"
        )
        assert process.exit_code is None, process.stderr_text
        yield socket
        process.terminate()
        process.wait()
