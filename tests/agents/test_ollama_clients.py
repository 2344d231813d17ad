"""Ollama's official clients, the newest of each, against a disaggregated mesh with a script: both see the same."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.agents.test_agents import INSTALL_S, KEY, RUN_S, scripted_mesh
from tests.harness import run_command

pytestmark = pytest.mark.full

TURNS: list[dict[str, Any]] = [
    {"reasoning": "A tool knows.", "text": "I ask.", "calls": [{"name": "get_weather", "arguments": {"city": "Oslo"}}]},
    {"text": "It is sunny in Oslo."},
]

PYTHON = """
import json, sys
import ollama

def get_weather(city: str) -> str:
    '''The weather in a city.

    Args:
      city: its name
    '''
    return "sunny in " + city

client = ollama.Client(sys.argv[1], headers={"authorization": "Bearer " + sys.argv[2]})
told = {"models": [model.model for model in client.list().models], "running": [model.model for model in client.ps().models]}
shown = client.show("dummy")
told["capabilities"] = shown.capabilities
messages = [{"role": "user", "content": "How is the weather?"}]
first = client.chat("dummy", messages, tools=[get_weather], think=True, keep_alive="5m", options={"num_ctx": 4096})
told["thinking"], told["content"] = first.message.thinking, first.message.content
told["durations"] = first.total_duration >= first.prompt_eval_duration + first.eval_duration > 0 and first.eval_count > 0
messages.append(first.message)
for call in first.message.tool_calls:
    result = {"get_weather": get_weather}[call.function.name](**call.function.arguments)
    messages.append({"role": "tool", "tool_name": call.function.name, "content": result})
    told["result"] = result
told["answer"] = "".join(part.message.content for part in client.chat("dummy:latest", messages, tools=[get_weather], stream=True))
streamed = list(client.chat("dummy", messages[:1], tools=[get_weather], stream=True))
told["calls"] = [dict(call.function.arguments) for part in streamed for call in part.message.tool_calls or ()]
whole = client.generate("dummy", "Once", raw=True, options={"num_predict": 4, "temperature": 0})
parts = client.generate("dummy", "Once", raw=True, options={"num_predict": 4, "temperature": 0}, stream=True)
told["generated"] = whole.response == "".join(part.response for part in parts) != ""
told["loaded"] = client.generate("dummy", keep_alive=0).done_reason
told["refused"] = []
for ask in (lambda: client.chat("nobody", messages[:1]), lambda: list(client.chat("nobody", messages[:1], stream=True)),
            lambda: client.embed("dummy", "text")):
    try:
        ask()
    except ollama.ResponseError as error:
        told["refused"].append(error.error)
print(json.dumps(told))
"""

JAVASCRIPT = """
import { Ollama } from "ollama"

const client = new Ollama({ host: process.argv[2], headers: { authorization: "Bearer " + process.argv[3] } })
const parameters = { type: "object", required: ["city"], properties: { city: { type: "string", description: "its name" } } }
const tools = [{ type: "function", function: { name: "get_weather", description: "The weather in a city.", parameters } }]
const told = {
  models: (await client.list()).models.map((model) => model.model),
  running: (await client.ps()).models.map((model) => model.model),
  capabilities: (await client.show({ model: "dummy" })).capabilities,
}
const messages = [{ role: "user", content: "How is the weather?" }]
const asked = { model: "dummy", messages, tools }
const first = await client.chat({ ...asked, think: true, keep_alive: "5m", options: { num_ctx: 4096 } })
told.thinking = first.message.thinking
told.content = first.message.content
told.durations = first.total_duration >= first.prompt_eval_duration + first.eval_duration && first.eval_duration > 0 && first.eval_count > 0
const later = [...messages, first.message]
for (const call of first.message.tool_calls) {
  told.result = "sunny in " + call.function.arguments.city
  later.push({ role: "tool", tool_name: call.function.name, content: told.result })
}
told.answer = ""
const again = { model: "dummy:latest", messages: later, tools }
for await (const part of await client.chat({ ...again, stream: true })) told.answer += part.message.content
told.calls = []
for await (const part of await client.chat({ ...asked, stream: true }))
  for (const call of part.message.tool_calls ?? []) told.calls.push(call.function.arguments)
const prompt = { model: "dummy", prompt: "Once", raw: true, options: { num_predict: 4, temperature: 0 } }
let text = ""
for await (const part of await client.generate({ ...prompt, stream: true })) text += part.response
told.generated = text !== "" && (await client.generate(prompt)).response === text
told.loaded = (await client.generate({ model: "dummy", prompt: "", keep_alive: 0 })).done_reason
told.refused = []
const nobody = { model: "nobody", messages }
for (const ask of [
  () => client.chat(nobody),
  async () => { for await (const part of await client.chat({ ...nobody, stream: true })) told.refused.push(part) },
  () => client.embed({ model: "dummy", input: "text" }),
]) {
  try { await ask() } catch (error) { told.refused.push(error.message) }
}
console.log(JSON.stringify(told))
"""


def installed(command: list[str], what: str, home: Path) -> None:
    done = run_command(command, INSTALL_S, env={"HOME": str(home)})
    if done.exit_code:
        pytest.skip(f"{what} cannot be installed: {done.stderr.splitlines()[-1:]}")


def python_program(place: Path) -> list[str]:
    """The command of the script for the client from PyPI."""
    packages = place / "packages"
    installed([sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), "ollama"], "Python's client", place)
    script = place / "client.py"
    script.write_text(PYTHON)
    return ["env", f"PYTHONPATH={packages}", sys.executable, str(script)]


def node_program(place: Path) -> list[str]:
    """The command of the script for the client from npm."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("there is no npm to install JavaScript's client with")
    installed([npm, "install", "--prefix", str(place), "--no-audit", "--no-fund", "ollama"], "JavaScript's client", place)
    script = place / "client.mjs"
    script.write_text(JAVASCRIPT)
    return [node, str(script)]


@pytest.mark.parametrize("program", [python_program, node_program])
def test_the_official_client_lists_chats_calls_a_tool_and_understands_refusals(program: Any, tmp_path: Path) -> None:
    command = program(tmp_path)
    with scripted_mesh(tmp_path, TURNS) as url:
        done = run_command([*command, url, KEY], RUN_S)
    assert done.exit_code == 0, done.stderr
    nobody = "the model 'nobody' is not served here; there are: dummy"
    assert json.loads(done.stdout) == {
        "models": ["dummy:latest"],
        "running": ["dummy:latest"],
        "capabilities": ["completion", "tools"],
        "thinking": "A tool knows.",
        "content": "I ask.",
        "durations": True,
        "result": "sunny in Oslo",
        "answer": "It is sunny in Oslo.",
        "calls": [{"city": "Oslo"}],
        "generated": True,
        "loaded": "load",
        "refused": [nobody, nobody, "no engine here makes embeddings"],
    }
