"""The server through OpenAI's own client."""

import pytest

GREEDY = {"temperature": 0, "max_tokens": 12}


def test_a_completion_is_what_the_model_writes_alone(client, server):
    from tests.serve.engines import solo
    from ropewalk.serve.slots import Settings

    told = client.completions.create(model="tiny", prompt="Once upon", **GREEDY)
    host = server.host
    ids = host.tokenizer.encode_prompt("Once upon")
    assert told.usage.prompt_tokens == len(ids)
    assert told.choices[0].finish_reason in ("length", "stop")
