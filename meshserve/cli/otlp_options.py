"""Where spans go: `--otlp`, and the environment variables that all OpenTelemetry exporters read.

(OpenTelemetry specification 1.55: OTLP exporter, environment variables.) `--otlp` takes
precedence over the variables, and a variable for traces over the one for all signals.
"""

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from meshserve.config import OtlpConfig
from meshserve.errors import UsageError

_PREFIX, _TRACES = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"
_DEFAULT_URL = "http://localhost:4318/v1/traces"
_PATH = "/v1/traces"


def otlp_config(
    option: str | None, environment: Mapping[str, str], is_observing: bool
) -> OtlpConfig | None:
    """None if spans go nowhere. Raises UsageError that names the option or the variable."""
    if option is not None and not is_observing:
        raise UsageError("--otlp needs the spans that --no-observe turns off: remove one of them")
    url = _url(option, environment) if is_observing else None
    if url is None:
        return None
    protocol = _variable(environment, "PROTOCOL")[1]
    if protocol == "grpc" and option is None:
        raise UsageError(
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: meshserve sends spans over HTTP; "
            "set http/json and the collector's HTTP endpoint, or OTEL_TRACES_EXPORTER=none"
        )
    return OtlpConfig(
        url,
        _headers(environment),
        _timeout_s(environment),
        _compression(environment),
        _variable(environment, "CERTIFICATE")[1] or None,
        _variable(environment, "CLIENT_CERTIFICATE")[1] or None,
        _variable(environment, "CLIENT_KEY")[1] or None,
        _resource(environment),
    )


def _variable(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """The variable that takes precedence, and its value; an empty variable counts as not set."""
    for variable in (_TRACES + name, _PREFIX + name):
        if value := environment.get(variable, "").strip():
            return variable, value
    return _PREFIX + name, ""


def _url(option: str | None, environment: Mapping[str, str]) -> str | None:
    if option is not None:
        return _checked("--otlp", option).rstrip("/") + _PATH
    exporters = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or (exporters and "otlp" not in map(str.strip, exporters.split(","))):
        return None
    variable, value = _variable(environment, "ENDPOINT")
    if not value:
        return _DEFAULT_URL if exporters else None
    url = _checked(variable, value)
    return url if variable.startswith(_TRACES) else url.rstrip("/") + _PATH


def _checked(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half of an IPv6 address, or a port that is none
        is_whole = False
    if not is_whole or not (url.isascii() and url.isprintable()) or " " in url:
        raise UsageError(f"{name} {url!r} is not a URL such as http://localhost:4318")
    if parts.username is not None:  # the message does not show what is secret
        raise UsageError(f"{name} has a user in its URL: {_PREFIX}HEADERS is for credentials")
    return url


def _headers(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Errors do not show values, because these are secrets."""
    variable, value = _variable(environment, "HEADERS")
    pairs = _pairs(variable, value)
    for name, text in pairs:
        if not (name.isascii() and name.replace("-", "").replace("_", "").isalnum()):
            raise UsageError(f"{variable}: {name!r} is not a valid header name")
        if not (text.isprintable() and text.isascii()):
            raise UsageError(f"{variable}: the value of {name} has characters that no header has")
    return pairs


def _pairs(variable: str, value: str) -> tuple[tuple[str, str], ...]:
    """`NAME=VALUE,NAME=VALUE`, percent-encoded (as in W3C Baggage)."""
    found = []
    for number, part in enumerate(filter(None, map(str.strip, value.split(","))), 1):
        name, equals, text = part.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{variable}: part {number} is not NAME=VALUE")
        found.append((unquote(name.strip()), unquote(text.strip())))
    return tuple(found)


def _timeout_s(environment: Mapping[str, str]) -> float:
    variable, value = _variable(environment, "TIMEOUT")
    if not value:
        return OtlpConfig("").timeout_s
    is_short = value.isascii() and value.isdecimal() and len(value) < 10
    if not is_short or not 0 < int(value) <= 600_000:
        raise UsageError(f"{variable} {value!r} is not a number of milliseconds from 1 to 600000")
    return int(value) / 1000


def _compression(environment: Mapping[str, str]) -> bool:
    variable, value = _variable(environment, "COMPRESSION")
    if value not in ("", "none", "gzip"):
        raise UsageError(f"{variable} {value!r}: use gzip or none")
    return value == "gzip"


def _resource(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    variable = "OTEL_RESOURCE_ATTRIBUTES"
    found = dict(_pairs(variable, environment.get(variable, "")))
    if name := environment.get("OTEL_SERVICE_NAME", "").strip():
        found["service.name"] = name
    return tuple(found.items())
