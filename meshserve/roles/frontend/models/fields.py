"""One table of what an HTTP API knows and no engine does: which fields are ignored, and which are refused. Pure.

Done is what a body's struct has. Ignored is what asks only for effort, speed, bookkeeping or presentation, or
declares what a server would do by itself: the answer is valid without it, and a response header names it.
Refused, by name, is what would change the answer. The parsers read this table, and the OpenAPI document and
docs/fields.md are made from it.
"""

from typing import Any, Literal, NamedTuple

Line = Literal["ignored", "refused"]


class Handling(NamedTuple):
    """What becomes of a field that is not done."""

    line: Line
    why: str
    unasked: tuple[Any, ...] = ()
    """The values besides null that ask for nothing."""
    is_beta: bool = False
    """Of a client that goes on without the field, if the error says so in the client's own form."""


Others = dict[str, Handling]
Row = tuple[str, str, Handling]
"""APIs and names of fields, each set apart by blanks, and what becomes of the fields."""


def _ignored(apis: str, names: str, why: str, *unasked: Any) -> Row:
    return apis, names, Handling("ignored", why, unasked)


def _refused(apis: str, names: str, *unasked: Any, why: str = "Not supported.") -> Row:
    return apis, names, Handling("refused", why, unasked)


_EFFORT = "The model decides how much it reasons."
_SPEED = "All requests have the same speed and price."
_BOOKS = "Not used; the answer does not change."
_SHOWN = "Concerns only the presentation of an answer."
_SERVER_TOOLS = "Tools that a server would run are omitted."
_HISTORY = "The model gets the whole conversation."
_FITS = "A prompt that fits is never cut; one that does not fit is refused."
_MACHINE = "Set when the model is started."
_CONSTRAINT = "Would change the constraint on the text."
_TEMPLATE = "Would change the prompt."
_ALL_OPENAI = "completions generate chat"

TABLE: tuple[Row, ...] = (
    # --- effort and speed
    _ignored("chat responses", "reasoning_effort", _EFFORT),
    _ignored("chat responses messages count_tokens", "reasoning thinking", _EFFORT),
    _ignored("chat", "verbosity", _SHOWN, "medium"),
    _ignored("text", "verbosity", _SHOWN, "medium"),
    _ignored("output_config", "effort task_budget", _EFFORT),
    _ignored("chat responses", "service_tier", _SPEED, "auto", "default"),
    _ignored("messages count_tokens", "service_tier", _SPEED, "auto", "standard_only"),
    _ignored("messages count_tokens", "speed", _SPEED, "standard"),
    _ignored("chat", "prediction", _SPEED),
    # --- bookkeeping and presentation
    _ignored("chat", "metadata", _BOOKS),
    _ignored("chat", "store", _BOOKS, False),
    _ignored("responses", "client_metadata max_tool_calls", _BOOKS),
    _ignored("completions generate chat responses", "prompt_cache_retention prompt_cache_options", _BOOKS),
    _ignored("completions generate chat responses", "safety_identifier", _BOOKS),
    _ignored("messages count_tokens", "cache_control user_profile_id", _BOOKS),
    _ignored("responses", "stream_options", _SHOWN),
    # --- what is kept of a conversation
    _ignored("responses", "truncation", _FITS, "disabled"),
    _ignored("responses", "context_management", _HISTORY, []),
    _ignored("messages count_tokens", "context_management", _HISTORY, {}),
    _refused("responses", "conversation prompt", why="Only responses are kept."),
    _refused("responses", "background", False, why="Answers are not computed in the background."),
    ("messages count_tokens", "thread", Handling("refused", "The client sends all messages instead.", (), True)),
    # --- what a server would do by itself
    _ignored("chat", "web_search_options", _SERVER_TOOLS),
    _ignored("messages count_tokens", "mcp_servers", _SERVER_TOOLS, []),
    _refused("messages count_tokens", "container inference_geo output_format"),
    _refused("output_config", "format", why=_CONSTRAINT),
    # --- what would change the answer
    _refused("chat", "audio moderation"),
    _refused("chat", "echo continue_final_message", False),
    _refused("chat", "functions documents", []),
    _refused("chat", "function_call", "none", "auto", why="The older form of `tool_choice`."),
    _refused("chat", "modalities", ["text"]),
    _refused("chat", "best_of", 1),
    _refused("chat tokenize", "chat_template", "", why=_TEMPLATE),
    _refused("chat tokenize", "chat_template_kwargs", {}, why=_TEMPLATE),
    _refused("chat", "add_generation_prompt", True, why=_TEMPLATE),
    _refused("responses", "stop", [], ""),
    _refused("responses", "n", 1),
    _refused("responses", "frequency_penalty presence_penalty", 0),
    _refused(_ALL_OPENAI, "prompt_logprobs truncate_prompt_tokens guided_grammar regex ebnf"),
    _refused(_ALL_OPENAI, "use_beam_search include_stop_str_in_output", False),
    _refused(_ALL_OPENAI, "return_token_ids return_tokens_as_token_ids", False),
    _refused(_ALL_OPENAI, "stop_token_ids bad_words logits_processors", []),
    _refused(_ALL_OPENAI, "length_penalty", 1),
    _refused(_ALL_OPENAI, "skip_special_tokens", True),
    _refused("completions generate", "prompt_embeds"),
    _refused("completions generate", "tools", []),
    _refused("completions generate", "suffix", ""),
    _refused("generate", "logprobs"),
    _refused("generate", "echo", False),
    _refused("generate", "n best_of", 1),
    _refused("structured_outputs", "grammar structural_tag whitespace_pattern", why=_CONSTRAINT),
    _refused("structured_outputs", "disable_fallback disable_any_whitespace disable_additional_properties", False, why=_CONSTRAINT),
    # --- Ollama's
    _ignored("ollama", "think", _EFFORT),
    _ignored("ollama", "keep_alive", "Models stay loaded."),
    _ignored("ollama", "truncate shift", _FITS, False),
    _ignored("options", "num_ctx", _FITS),
    _ignored("options", "num_keep", _FITS),
    _ignored("options", "num_batch num_gpu main_gpu num_thread numa low_vram", _MACHINE),
    _ignored("options", "f16_kv use_mmap use_mlock vocab_only logits_all embedding_only", _MACHINE),
    _ignored("options", "repeat_last_n", "Penalties count all tokens.", -1),
    _ignored("options", "penalize_newline", "Penalties count all tokens.", True),
    _ignored("options", "mirostat_eta mirostat_tau", "Used only with `mirostat`, which is refused."),
    _refused("options", "mirostat", 0),
    _refused("options", "tfs_z typical_p", 1),
    _refused("ollama_generate", "suffix template", ""),
    _refused("ollama_generate", "images context", []),
    # --- counting
    _refused("tokenize", "continue_final_message", False),
    _refused("tokenize", "documents", []),
    _refused("tokenize_prompt", "add_special_tokens", True),
    _refused("tokenize_chat", "add_special_tokens", False),
)


def others(*apis: str) -> Others:
    """By name, the fields that these APIs know and that are not done there."""
    wanted = set(apis)
    return {name: how for found, names, how in TABLE if not wanted.isdisjoint(found.split()) for name in names.split()}


# --- what is left out of a conversation that another model began

LEFT_OUT_ITEMS = """
web_search_call file_search_call code_interpreter_call image_generation_call computer_call computer_call_output
local_shell_call local_shell_call_output shell_call shell_call_output apply_patch_call apply_patch_call_output
mcp_list_tools mcp_call mcp_approval_request mcp_approval_response tool_search_call tool_search_output compaction
"""
"""Items of the Responses API: what tools did that a server runs, and what only the server that wrote it can read."""
LEFT_OUT_BLOCKS = """
server_tool_use web_search_tool_result web_fetch_tool_result code_execution_tool_result
bash_code_execution_tool_result text_editor_code_execution_tool_result tool_search_tool_result advisor_tool_result
mcp_tool_use mcp_tool_result redacted_thinking container_upload fallback
"""
"""Blocks of an answer in Anthropic's API, likewise."""


# --- names in a header

_INNER = "cache_control"
"""A field of messages, parts and tools: nobody looks for it where it stands."""

MAX_NAMED = 64
_MAX_CHARACTERS = 64
HEADER = "x-meshserve-ignored"


def note_inner(body: bytes, ignored: list[str]) -> None:
    """Name what is ignored anywhere in this body."""
    if b'"%b"' % _INNER.encode() in body and _INNER not in ignored:
        ignored.append(_INNER)


def header_line(ignored: list[str]) -> bytes:
    """The header that names what was ignored, each once. Names that no header can hold are question marks."""
    names = list(dict.fromkeys(map(_shown, ignored)))
    more = [] if len(names) <= MAX_NAMED else ["..."]
    return f"{HEADER}: {', '.join([*names[:MAX_NAMED], *more])}\r\n".encode()


def _shown(name: str) -> str:
    is_plain = name.isascii() and name.replace(".", "").replace("_", "").replace("-", "").isalnum()
    return name if is_plain and len(name) <= _MAX_CHARACTERS else "?"

