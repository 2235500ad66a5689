"""Drives the OpenAI-compatible entry with the unmodified Python client.

Needs BASE_URL, KEY and ACME_KEY in the environment; exits non-zero when anything differs from what the client's users may
expect.
"""

import json
import os

import openai

BASE_URL, KEY, ACME_KEY = (os.environ[name] for name in ("BASE_URL", "KEY", "ACME_KEY"))
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def connect(key, **more):
    return openai.OpenAI(base_url=BASE_URL, api_key=key, max_retries=0, **more)


client = connect(KEY)


def ask(content, of=client, model="small", **more):
    return of.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **more)


def failure(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def plain():
    answer = ask("say hello", temperature=0.5)
    assert answer.choices[0].message.content == "say hello", answer
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("stop", 12), answer


def streamed():
    chunks = list(ask("one two three", stream=True, stream_options={"include_usage": True}))
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [text for text in said if text] == ["one ", "two ", "three"], said
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [13]
    assert chunks[-2].choices[0].finish_reason == "stop"


def tools():
    choice = ask("tools", tools=TOOLS, tool_choice="auto").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None), choice
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Ulm"}

    messages = [{"role": "user", "content": "tools"}]
    with client.chat.completions.stream(model="small", messages=messages, tools=TOOLS) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == ("call_1", "weather", '{"city":"Ulm"}'), call


def models():
    def names(of):
        return [model.id for model in of.models.list()]

    assert names(client) == ["busy", "default", "hasty", "small"], names(client)
    assert names(connect(ACME_KEY)) == ["busy", "default", "hasty", "own", "small"]
    assert ask("hi", of=connect(ACME_KEY), model="own").choices[0].message.content == "hi"
    failure(openai.NotFoundError, lambda: client.models.retrieve("own"))


def embeddings():
    for more in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="small", input=["a", "b"], **more)
        assert [item.embedding for item in answer.data] == [[0.0, 0.5, -1.0]] * 2, answer


def errors():
    error = failure(openai.AuthenticationError, lambda: ask("hi", of=connect("wrong")))
    assert error.code == "invalid_api_key", error
    error = failure(openai.NotFoundError, lambda: ask("hi", model="own"))
    assert error.code == "model_not_found" and error.param == "model", error
    error = failure(openai.BadRequestError, lambda: ask("hi", n=2))
    assert error.param == "n", error
    failure(openai.BadRequestError, lambda: ask("too long"))
    failure(openai.InternalServerError, lambda: ask("broken"))
    for stream in (False, True):
        error = failure(openai.RateLimitError, lambda: ask("busy", model="busy", stream=stream))
        assert int(error.response.headers["retry-after"]) >= 1
        error = failure(openai.InternalServerError, lambda: ask("hang", model="hasty", stream=stream))
        assert (error.status_code, error.code) == (504, "first_token_timeout"), error
    error = failure(openai.APIError, lambda: list(ask("breaks", stream=True)))
    assert error.code == "broken_stream", error


def cancelled():
    with ask("slow", stream=True) as stream:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
    failure(openai.APITimeoutError, lambda: ask("hang", of=connect(KEY, timeout=0.5)))


for test in (plain, streamed, tools, models, embeddings, errors, cancelled):
    test()
    print(f"{test.__name__}: ok")
