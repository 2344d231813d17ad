"""Settings, with defaults for a LAN. Every field says its unit, and what raising or lowering it costs."""

from dataclasses import dataclass, field

PROTOCOL_MAJOR = 4
PROTOCOL_MINOR = 0

FIRST_PORT = 7800
"""Where a peer looks for its block of ports, and what `--peer HOST` means."""

PORTS_PER_PEER = 4
"""Calls, bulk, tickets and one in reserve, so that one firewall rule covers a host."""

KV_TYPES = ("q8_0", "f16")
"""Elements of a real model's KV cache."""

ROLES = ("frontend", "processor", "router", "decode", "prefill")


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """Bounds of the sockets and of what waits for them."""

    max_message_bytes: int = 16 * 1024 * 1024
    """Longest frame taken from a peer on the call sockets. Higher lets one hostile peer hold more memory; lower refuses longer prompts."""
    max_batch_bytes: int = 1024 * 1024
    """What is ready for one peer in one turn leaves in messages of about this size. Higher delays what shares the link."""
    credit_bytes: int = 4 * 1024 * 1024
    """Sent to one peer and not yet read by it. Lower throttles links with a long round trip; higher queues more in a slow peer."""
    max_outbox_bytes: int = 32 * 1024 * 1024
    """Waiting here for one peer's credit. A link above it is dropped: higher costs memory per slow peer, lower loses bursts."""
    max_reads_per_turn: int = 200
    """Messages read from one socket before others get a turn. Higher favours throughput, lower the fairness between sockets."""
    max_streams_per_peer: int = 8192
    """Streams that one peer may have open here. Lower refuses bursts, higher lets one peer hold more memory."""
    bulk_window_bytes: int = 8 * 1024 * 1024
    """KV bytes of one transfer that are on their way. Lower leaves a fast link idle, higher delays a cancellation."""
    bulk_message_bytes: int = 2 * 1024 * 1024
    """KV bytes in one message, on a link that is not slow. Higher holds up the receiver's event loop, lower costs more messages (with 1 MiB
    blocks of 2 MiB are handed over at 0.9 times the rate)."""
    bulk_bytes_per_s: float = 0.0
    """KV bytes that this peer sends in a second, to all others together; 0 is no limit. Lower keeps a slow link smooth for tokens."""


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """Who a peer is, how it finds others, and when it counts them as dead."""

    mesh: str = "default"
    """Peers of other meshes are ignored."""
    name: str | None = None
    """For people; None is HOST-xxxx."""
    roles: tuple[str, ...] = ()
    """Empty: an observer, which is listed nowhere and binds nothing."""
    interface: str | None = None
    """Name or address of the one interface to use; None: all that are usable."""
    port: int | None = None
    """First of four consecutive ports; None: the first free four from 7800 on. Tests pass a block of their own."""
    seeds: tuple[str, ...] = ()
    """HOST or HOST:PORT, from `--peer`."""
    use_mdns: bool = True
    key_file: str | None = None
    tick_interval_s: float = 0.1
    """Between two checks of deadlines. Lower notices sooner by as much and wakes an idle peer more often."""
    heartbeat_interval_s: float = 0.3
    """A peer whose roles talk to ours is pinged when silent for so long. Must be well under `failure_timeout_s`; lower costs idle CPU."""
    failure_timeout_s: float = 1.5
    """Silence after which a peer is suspect and gets no new work. Lower mistakes stalls for failures, higher sends work into the void."""
    death_timeout_s: float = 5.0
    """Silence of a suspect after which it is dead and what it owned is dropped. Lower destroys healthy work, higher holds memory."""
    dial_timeout_s: float = 1.0
    """For one address, from TCP to welcome. Lower gives up on slow links, higher delays the next address."""
    dial_stagger_s: float = 0.1
    """Before the next address of the same peer is tried beside the first."""
    redial_max_s: float = 2.0
    """Longest pause between dials of a peer that does not answer. Higher finds a returning peer later, lower costs traffic."""
    forget_hint_s: float = 60.0
    """How long a peer that is only known by hearsay is dialled without success."""
    forget_dead_s: float = 3600.0
    """How long a peer that fell silent is dialled on, so that a host that wakes finds its way back. Lower loses it, higher costs dials."""
    lonely_after_s: float = 3.0
    """A peer alone for so long says so."""
    max_hints: int = 1024
    """Peers known by hearsay. A flood of records beyond it is ignored."""
    transport: TransportConfig = field(default_factory=TransportConfig)


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """When prompts are prefilled elsewhere, and how long each step may take."""

    max_local_prefill_tokens: int | None = None
    """Prompts with at most so many uncached tokens are never handed over. Lower hands over more, at a round trip each. None: expected
    times to the first token decide alone, and 256 tokens where they say nothing."""
    max_prefill_queue: int = 64
    """Prompts queued at the best prefill worker, own tickets included, from which on a decode worker prefills itself."""
    hedge_ms: float = 20.0
    """An unclaimed ticket goes to all other prefill workers after this. Lower costs messages, higher waits for a busy one."""
    reminder_ms: float = 250.0
    """A ticket that was not claimed for so long is sent again, then after twice the time, and so on: it may have been lost on its way.
    Lower costs messages where many prompts wait, higher delays the few whose ticket was lost."""
    claim_timeout_s: float = 10.0
    """A task that was not claimed in this time is prefilled locally, however alive the prefill workers look."""
    offer_kv_bytes: int = 256 * 1024
    """A prompt with at most so much KV to compute goes with its ticket, if that goes to one worker, and its KV comes back with the claim.
    Higher puts more KV on the connection of the calls and computes more in vain where a worker is late; 0 offers nothing."""
    progress_timeout_s: float = 10.0
    """An attempt whose blocks are on their way fails if its decode worker acknowledges no byte for this time, of this attempt or of
    earlier attempts on the same link. Lower gives up on slow links (a frame of 256 KiB takes 10 s at 0.2 Mbit/s), higher holds a slot."""
    prefill_slots: int = 16
    """Most prompts that a prefill worker has at once. Where more than so many wait, it batches small ones."""
    sending_slots: int = 16
    """Prompts more whose blocks are computed and still on their way. Higher holds more KV for slow links, lower leaves the engine idle."""
    prefill_batch_tokens: int = 2048
    """Such a batch, in tokens. Higher gives the engine more to do in one step, lower delays the first of them less."""
    claim_ahead_ms: float = 5.0
    """A worker claims its next prompt when what it has takes no longer than this. Lower idles for a round trip between two prompts,
    higher binds a prompt to this worker while another may come free sooner."""
    max_tickets: int = 4096
    """Tickets that a prefill worker keeps; those beyond it are refused to their senders, who go elsewhere."""
    max_lost_peers: int = 2
    """A request that took so many workers down is tried nowhere else."""


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """What a frontend takes from clients, and how long it waits for them."""

    cors_origins: tuple[str, ...] = ()
    """Pages of these origins may ask from a browser; `*` is all."""
    allowed_hosts: tuple[str, ...] = ()
    """More host names for an open frontend on loopback, each with any port or with the port that it names."""
    root_path: str = ""
    """Path under which a proxy offers this frontend, such as `/llm`. Requests with and without the path are served."""
    forwarded_allow_ips: str = ""
    """Proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted: addresses and networks with commas between them, or `*`."""
    tls_cert: str | None = None
    """PEM file with the certificate and its chain; None: plain HTTP."""
    tls_key: str | None = None
    max_connections: int = 8192
    """Open at a time; more are told 503. Higher costs some 10 KiB each. Fewer where the process may not open as many files."""
    max_connections_per_address: int = 4096
    """Of them, of one address, so that one cannot keep all others out. Lower troubles many clients behind one proxy."""
    max_header_bytes: int = 16 * 1024
    """Request line and headers. Higher takes more cookies, and lets a stranger hold more memory."""
    header_timeout_s: float = 5.0
    """From a connection's first byte, or its opening, to the end of the headers. Lower cuts off clients on bad links."""
    body_timeout_s: float = 5.0
    """For a body, besides the time that `min_body_bytes_per_s` gives it."""
    min_body_bytes_per_s: float = 32 * 1024.0
    """A body that comes slower than this over all is cut off. Higher cuts off slow links, lower holds connections."""
    write_timeout_s: float = 6.0
    """A client that takes in nothing for so long, while there is something for it, is cut off, and its request ends."""
    keep_alive_s: float = 8.0
    """An idle connection is closed. Longer than the pools of common clients keep theirs (5 s), else they meet closed ones."""
    linger_s: float = 2.0
    """After a refusal, what the client still sends is thrown away for so long: closing at once could take the answer back."""
    stream_ping_s: float = 5.0
    """Longest pause in a stream before a comment is sent; 0: no comments. Proxies with a shorter read timeout end the stream."""
    max_unread_texts: int = 65_536
    """Pieces of text that wait for one client. Higher holds more for slow ones, lower ends their requests sooner."""
    max_queued: int = 4096
    """Requests that wait in this frontend for a place in the mesh. More are refused."""
    max_wait_s: float = 10.0
    """No request waits longer for its place: 503."""
    standing_s: float = 3.0
    """A queue that did not empty for so long is no burst but overload: what waited longer than half a typical request is refused
    from then on, until the queue is empty. Lower refuses bursts, higher lets more clients wait in vain."""
    session_s: float = 12 * 3600.0
    """How long a browser stays logged in."""


@dataclass(frozen=True, slots=True)
class OtlpConfig:
    """How spans are sent to an OpenTelemetry collector."""

    url: str
    """The complete URL, usually with `/v1/traces`."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    timeout_s: float = 2.0
    """For one message. Higher waits for slow collectors, and may delay the end of a peer by that time."""
    is_compressed: bool = False
    """Whether messages are compressed with gzip: costs CPU time on a thread, and saves nine tenths of the bytes."""
    ca_file: str | None = None
    """PEM file with certificates to trust; None: those of the system."""
    client_cert: str | None = None
    client_key: str | None = None
    resource: tuple[tuple[str, str], ...] = ()
    """More attributes of this peer, such as `deployment.environment.name`."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How requests are served by this peer's roles."""

    http_host: str = "127.0.0.1"
    http_port: int = 8000
    """0 takes any free port."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    policy: str = "kv"
    engine: str = "dummy"
    model: str | None = None
    served_model_names: tuple[str, ...] = ()
    """What clients call the model, the first one in answers of this mesh; empty: what the engine calls it."""
    engine_options: tuple[tuple[str, str], ...] = ()
    kv_cache_tokens: int | None = None
    """Tokens in the engine's KV cache; None: the engine fits it to this machine. Higher takes memory, lower lets fewer sequences run."""
    kv_type: str | None = None
    """Of :data:`KV_TYPES`; None: the engine's default."""
    request_timeout_s: float = 600.0
    """For a whole request. Lower ends long generations, higher holds what a stuck one uses."""
    max_migrations: int = 16
    """How often a request whose output has begun may continue at another worker, after the loss of one; the same for processors.
    Higher lets a harmful request end more workers, if each worker still gives a token; 0: the first loss ends the request in an
    error."""
    stall_timeout_s: float = 30.0
    """A request leaves a decode worker that lives when progress is overdue for this time, by the worker's own forecast. Lower leaves a
    hung worker sooner, but also a slow worker; higher lets clients wait longer."""
    drain_timeout_s: float = 30.0
    """How long running requests may go on after a signal to stop."""
    max_requests: int = 4096
    """In one frontend at a time; more are refused with 503."""
    max_decode_queue: int = 1024
    """Requests that a decode worker has accepted and not begun; beyond it others are asked. Higher waits longer, lower refuses bursts."""
    max_body_bytes: int = 2 * 1024 * 1024
    """Longest HTTP body. Lower refuses long prompts; higher holds the event loop up for as long as it takes to parse (3 ms a MiB)."""
    receipts_kept: int = 1000
    """Of the last requests, in the processor's memory."""
    responses_kept: int = 1000
    """Number of responses that a processor keeps in memory, for later requests that refer to them. 0 keeps none."""
    responses_kept_bytes: int = 64 * 1024 * 1024
    """Bytes of all kept responses with their conversations. Higher takes memory; lower drops long conversations sooner."""
    record: str | None = None
    """A file that gets a line of JSON for every step of every request; None: no record. It costs a write each."""
    observe: bool = True
    """False: no spans, no metrics."""
    metrics_vllm: bool = False
    """Whether `/metrics` has vLLM's names beside meshserve's, which makes `/metrics` a tenth longer."""
    otlp: OtlpConfig | None = None
    """The OpenTelemetry collector that gets the spans; None: no collector does."""
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
